"""How to write a fusion policy: any callable from probabilities to a Mixture.

python examples/own_policy.py --model BUNDLE "Convert 3 kilometres to metres."
"""

import argparse
from collections.abc import Mapping

import dlp_lora
from dlp_lora import Mixture, TopP


class Sharpened:
    """Weighs adapters by their squared probability; if none is likely, the base model answers."""

    def __init__(self, floor: float) -> None:
        self.floor = floor

    def __call__(self, probabilities: Mapping[str, float]) -> Mixture:
        likely = {name: p**2 for name, p in probabilities.items() if p >= self.floor}
        return Mixture({name: weight / sum(likely.values()) for name, weight in likely.items()})


parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="a bundle")
parser.add_argument("--floor", type=float, default=0.2, help="less likely adapters are left out")
parser.add_argument("--max-new-tokens", type=int, default=40)
parser.add_argument("prompt", nargs="?", default="Convert 3 kilometres to metres.")
args = parser.parse_args()

engine = dlp_lora.load(args.model, policy=Sharpened(args.floor))
for policy in (engine.policy, TopP(0.9)):
    with engine.using(policy=policy):
        answer = engine.generate(args.prompt, max_new_tokens=args.max_new_tokens, do_sample=False)
    print(type(policy).__name__)
    for sentence in answer.trace:
        print(f"  {sentence.mixture}: {sentence.text!r}")
