"""From your questions and answers to a bundle: task folders, adapters and a router.

python examples/own_tasks.py --model MODEL --out own/
"""

import argparse
from pathlib import Path

import dlp_lora
from dlp_lora.tasks import Example, Task, read_tasks, write_task
from dlp_lora.training.adapters import train_adapters
from dlp_lora.training.args import AdapterTrainingArgs
from dlp_lora.training.base import load_base
from dlp_lora.training.router import RouterTrainingArgs, load_tokenizer, train_router

parser = argparse.ArgumentParser()
parser.add_argument("--model", required=True, help="base model: folder or hub id")
parser.add_argument("--out", type=Path, default=Path("own"))
parser.add_argument("--size", type=int, default=60, help="training examples a task")
args = parser.parse_args()

for name, question, answer in (
    ("doubling", "What is {} doubled?", "The double of {} is {}."),
    ("greeting", "Greet guest number {} of the house.", "Welcome to the house, guest {}, and to room {}."),
):
    examples = [Example(prompt=question.format(i), answer=answer.format(i, 2 * i)) for i in range(args.size + 5)]
    task = Task(name=name, train=tuple(examples[: args.size]), test=tuple(examples[args.size :]))
    write_task(args.out / "data" / name, task)

tasks = read_tasks(args.out / "data")
model, tokenizer = load_base(args.model)
for adapter in train_adapters(model, tokenizer, tasks, args.out / "adapters", AdapterTrainingArgs(batch_size=4)):
    print(f"{adapter.name}: loss {adapter.final_loss:.3f} after {adapter.seconds:.0f} s")
router, report = train_router(tasks, load_tokenizer(args.model), RouterTrainingArgs(epochs=10))
print(f"router: {report.accuracy:.0%} of {report.num_test} held-out prompts")

engine = dlp_lora.load(model, tokenizer=tokenizer, adapters=args.out / "adapters", router=router)
engine.save_pretrained(args.out / "bundle")
print(f"wrote {args.out / 'bundle'}; try: dlp-lora chat --bundle {args.out / 'bundle'}")
