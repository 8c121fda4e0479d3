"""A causal LM, a bank, a router and a policy as one model (Fig. 1)."""
