"""A causal LM, a bank, a router and a policy, working as one model (Fig. 1)."""
