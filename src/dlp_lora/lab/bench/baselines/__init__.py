"""Peers that are only papers, written by us from their descriptions, to measure against: they are not their authors'.

Each takes a model and PEFT adapters and gives the same model back, changed; `detach` undoes any of them. Gates, and
PESC's experts, have random weights: they cost what trained ones do, but choose by chance, so speed, memory and
correctness can be measured with them and quality cannot. Attach where the model is to run: on its device, in its dtype.

MeteoRA, MoRAL and MoLA share `gated.py`; `pesc.py` and `lora_switch.py` take its gate.
"""

from dlp_lora.lab.bench.baselines.gated import detach
from dlp_lora.lab.bench.baselines.lora_switch import attach_lora_switch
from dlp_lora.lab.bench.baselines.meteora import attach_meteora
from dlp_lora.lab.bench.baselines.mola import attach_mola
from dlp_lora.lab.bench.baselines.moral import attach_moral
from dlp_lora.lab.bench.baselines.pesc import attach_pesc

__all__ = ["attach_lora_switch", "attach_meteora", "attach_mola", "attach_moral", "attach_pesc", "detach"]
