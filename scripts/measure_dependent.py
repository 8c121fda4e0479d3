"""Measures prompts whose second part needs the first: trains the demo's adapters and one for such prompts, and answers.

    python scripts/measure_dependent.py --out runs/dependent --json results/dependent.json

Interrupted, the same command goes on where it stopped.
"""

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dlp_lora import TopP, load
from dlp_lora.cli.progress import progress
from dlp_lora.default_model import default_model
from dlp_lora.demo import DemoArgs, with_serial
from dlp_lora.files import write_json
from dlp_lora.lab.evals.answers import identity_of
from dlp_lora.lab.evals.dependent import (
    KINDS,
    WAYS,
    answer_dependent,
    dependent_prompts,
    dependent_scores,
    dependent_task,
)
from dlp_lora.lab.evals.methods import METHODS
from dlp_lora.lab.records.environment import environment
from dlp_lora.progress import staged
from dlp_lora.router import MiniMLP
from dlp_lora.tasks import procedural_task
from dlp_lora.training.adapters import train_adapter
from dlp_lora.training.base import load_base
from dlp_lora.training.extend import remove_tasks
from dlp_lora.training.router import REPORT_FILE, RouterTrainingArgs, load_tokenizer, train_router_into


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--json", type=Path, required=True, help="record to write")
    parser.add_argument("--prompts", type=int, default=60, help="prompts of each kind")
    options = parser.parse_args()
    args = DemoArgs()
    num_train = args.num_train + args.num_serial
    single = [
        procedural_task(name, num_train=num_train, num_test=args.num_test, seed=args.data_seed) for name in args.tasks
    ]
    two_steps = dependent_task(num_train=2 * num_train, num_test=0, seed=1)
    base, tokenizer = load_base(default_model())
    paths: dict[str, Path] = {}
    with progress() as show:
        for task in [*with_serial(single, args), two_steps]:
            trained = train_adapter(
                base, tokenizer, task, options.out / "adapters" / task.name, replace(args.training, seed=args.seed),
                on_progress=show,
            )  # fmt: skip
            paths[task.name] = trained.path
        router = options.out / "router"
        if not (router / REPORT_FILE).is_file():
            train_router_into(
                router,
                [*single, two_steps],
                load_tokenizer(str(default_model())),
                RouterTrainingArgs(epochs=args.router_epochs, seed=args.seed),
                on_progress=show,
            )
        all_tasks = MiniMLP.from_pretrained(router)
        learned = {example.prompt for example in two_steps.train}
        drawn = dependent_prompts(3 * options.prompts * len(KINDS), seed=2)
        fresh = [each for each in drawn if each.prompt not in learned]
        prompts = [each for kind in KINDS for each in [p for p in fresh if p.kind == kind][: options.prompts]]
        record: dict[str, Any] = {"environment": environment(), "args": asdict(args)}
        record["banks"] = {}
        banks = {"singles": remove_tasks(all_tasks, [two_steps.name]), "with two_steps": all_tasks}
        for bank, chosen in banks.items():
            own = {name: paths[name] for name in chosen.names}
            engine = load(base, tokenizer=tokenizer, adapters=own, router=chosen, policy=TopP(0.6))
            record["identity"] = identity_of(engine, [*single, two_steps], METHODS["dlp"])
            folder = options.out / "answers" / bank.replace(" ", "-")
            scores = {}
            for way in WAYS:
                rows = answer_dependent(
                    engine,
                    way,
                    prompts,
                    folder / f"{way}.jsonl",
                    identity=record["identity"],
                    prompt_format="plain",
                    on_progress=staged(show, f"{bank}: {way}"),
                )
                scores[way] = dependent_scores(rows)
                record["banks"][bank] = scores
                write_json(options.json, record)
            engine.detach()


if __name__ == "__main__":
    main()
