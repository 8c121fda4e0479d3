"""Answers prompts with many adapters, and shows which sentence used which adapters.

python examples/quickstart.py --model BUNDLE
python examples/quickstart.py --model MODEL --adapters adapters/ --router router/ "Your prompt"
"""

import argparse

import dlp_lora

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="a bundle, or a base model: folder or hub id")
parser.add_argument("--adapters", help="folder of PEFT adapter folders, with a base model")
parser.add_argument("--router", help="router folder, with a base model")
parser.add_argument("--max-new-tokens", type=int, default=40)
parser.add_argument("prompts", nargs="*", default=["Convert 3 kilometres to metres.", "What is the code word?"])
args = parser.parse_args()

engine = dlp_lora.load(args.model, adapters=args.adapters, router=args.router)
options = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

# One batch: each row chooses its adapters at each sentence.
for prompt, answer in zip(args.prompts, engine.generate(args.prompts, **options), strict=True):
    print(f"\n{prompt}")
    for sentence in answer.trace:
        print(f"  {sentence.mixture}: {sentence.text!r}")

name = engine.bank.names[0]
with engine.fixed({name: 1.0}):
    print(f"\n{name} alone: {engine.generate(args.prompts[0], **options).text!r}")
with engine.disabled():
    print(f"the base model: {engine.generate(args.prompts[0], **options).text!r}")

print("streamed: ", end="")
for piece in engine.stream(args.prompts[0], **options):
    print(piece, end="", flush=True)
print()
