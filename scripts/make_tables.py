"""Writes the tables of the README and the docs from the records in results/.

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a record's, or that of a part of one.
"""

import json
import re
import runpy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dlp_lora.lab.evals.methods import MAIN, about, label
from dlp_lora.lab.records.table import markdown_grid
from dlp_lora.lab.report.router.tables import MADE_FROM

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md",
    "docs/models.md",
    "docs/performance.md",
    "docs/how-to-measure-router.md",
    "docs/how-to-own-adapters.md",
    "docs/how-to-reproduce.md",
    "docs/how-to-serve.md",
    "docs/scale.md",
)
BLOCK = re.compile(r"(<!-- table: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)

Cell = Callable[[Mapping[str, Any]], str]


def main() -> None:
    """Writes every table."""
    for page, text in pages().items():
        (ROOT / page).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """Gives the text of each page by its path, with its tables as the records have them."""
    return {page: BLOCK.sub(_block, (ROOT / page).read_text(encoding="utf-8")) for page in PAGES}


def _block(match: re.Match[str]) -> str:
    return f"{match[1]}\n{TABLES[match['name']]()}\n\n{match[3]}"


def _record(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _table(columns: Mapping[str, Cell], rows: Sequence[Mapping[str, Any]], *, words: int = 1) -> str:
    """A Markdown table; the first `words` columns are left-aligned."""
    return markdown_grid(list(columns), ([cell(row) for cell in columns.values()] for row in rows), num_labels=words)


def _number(key: str, digits: int) -> Cell:
    return lambda row: "–" if row.get(key) is None else f"{row[key]:,.{digits}f}"


def _spread(key: str, digits: int = 2) -> Cell:
    return lambda row: f"{row[f'{key}_min']:.{digits}f}-{row[f'{key}_max']:.{digits}f}"


def _percent(key: str, digits: int) -> Cell:
    return lambda row: "–" if row.get(key) is None else f"{100 * row[key]:.{digits}f} %"


VARIANT: dict[str, Cell] = {"variant": lambda row: row["name"], "dtype": lambda row: row["dtype"]}
TRAIN: dict[str, Cell] = {
    "variant": VARIANT["variant"],
    "task": lambda row: row["task"],
    "samples/s": _number("samples_per_s", 2),
    "speed-up": _number("speedup", 2),
    "spread": _spread("speedup"),
    "peak MB": _number("peak_mb", 0),
    "encoded once": _percent("shared", 0),
    "loss": _number("loss", 4),
}
RATIO: dict[str, Cell] = {"over base": _number("ratio", 3), "spread": _spread("ratio")}
STEP: dict[str, Cell] = {"ms/token": _number("ms_per_token", 1), **RATIO}
MEMORY: dict[str, Cell] = {"peak MB": _number("peak_mb", 0), "peak over base": _number("memory_ratio", 2)}


def _decoding(name: str) -> Callable[[], str]:
    """Time a token of each variant."""
    columns = {
        **VARIANT,
        **STEP,
        "over a base alike": _number("ratio_over_alike", 3),
        "of bandwidth": _percent("bandwidth_share", 0),
        "peak over base": MEMORY["peak over base"],
    }

    def rows() -> list[dict[str, Any]]:
        return [{**row, **_alike(row, name)} for row in _record(name)["rows"]]

    return lambda: _table(columns, rows(), words=2)


def _alike(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What a variant takes over the base that computes its products in the same way.

    Of records that do not hold it, by the medians over the plain base.
    """
    if "ratio_over_alike" in row:
        return {}
    if not row["name"].startswith("dlp-lora"):
        return {}
    if any(way in row["name"] for way in ("merged", "concatenated")):
        return {"ratio_over_alike": row["ratio"]}
    base = next((way for way in ("prepacked", "compiled") if way in row["name"]), None)
    if base is None:
        return {"ratio_over_alike": row["ratio_over_stacked"]}
    rows = [each for each in _record(name)["rows"] if each["dtype"] == row["dtype"]]
    return {"ratio_over_alike": row["ratio"] / next(r["ratio"] for r in rows if r["name"] == f"base, {base}")}


SENTENCES = ("dlp-lora, routed, 3 of 26 a sentence", "dlp-lora, prepacked, 3 of 26 a sentence")
DECODED = ("dlp-lora, 3 of 26", "dlp-lora, prepacked, 3 of 26")
SPEED_TARGETS: tuple[tuple[str, str, tuple[str, ...], dict[str, float]], ...] = (
    ("one prompt", "decode", DECODED, {"bfloat16": 1.00, "float32": 1.03}),
    ("eight prompts with mixtures of their own", "decode_batch8", DECODED, {"bfloat16": 1.05}),
    ("all linear layers adapted", "decode_all_linear", DECODED, {"bfloat16": 1.08}),
    ("concatenated layers", "paths", ("dlp-lora, concatenated",), {"bfloat16": 1.08}),
    ("prompts read by sentence, EPYC", "prefill_batch4", SENTENCES, {"bfloat16": 1.05}),
    ("prompts read by sentence, Xeon", "prefill_xeon", SENTENCES, {"bfloat16": 1.05, "float32": 1.05}),
)
"""What, record, variants (plain, then prepacked), and the most that each precision may take over the base."""


def _speed_targets() -> str:
    """Time over the base beside what we aim at, bold where it is more."""

    def cell(dtype: str, which: int) -> Cell:
        def text(row: Mapping[str, Any]) -> str:
            names, bound = row["names"], row["bounds"].get(dtype)
            if bound is None or which >= len(names):
                return "–"
            found = _record(row["record"])["rows"]
            ratio = next(each["ratio"] for each in found if (each["name"], each["dtype"]) == (names[which], dtype))
            return f"**{ratio:.2f}**" if ratio > bound else f"{ratio:.2f}"

        return text

    def target(row: Mapping[str, Any]) -> str:
        bounds = [f"{bound:.2f}" for bound in row["bounds"].values()]
        return bounds[0] if len(set(bounds)) == 1 else f"{bounds[0]}, float32 {bounds[1]}"

    columns: dict[str, Cell] = {
        "what": lambda row: row["what"],
        "target": target,
        "bfloat16": cell("bfloat16", 0),
        "bfloat16, prepacked": cell("bfloat16", 1),
        "float32": cell("float32", 0),
        "float32, prepacked": cell("float32", 1),
    }
    keys = ("what", "record", "names", "bounds")
    return _table(columns, [dict(zip(keys, row, strict=True)) for row in SPEED_TARGETS])


def _rows(name: str, columns: Mapping[str, Cell], *, words: int = 1) -> Callable[[], str]:
    return lambda: _table(columns, _record(name)["rows"], words=words)


def _untrained() -> str:
    """Routers without training, by data and by what they are made from."""
    data = {"the paper's 26": "untrained_tasks26", "41 others": "untrained_tasks_extra"}
    columns: dict[str, Cell] = {
        "tasks": lambda row: row["data"],
        "made from": lambda row: row["made"],
        "routed": _percent("kept", 1),
        "routed and right": _percent("kept_and_right", 1),
        "left-out tasks sent to the base": _percent("left_out_to_base", 1),
        "everyday prompts sent to the base": _percent("everyday_to_base", 1),
    }
    rows = [
        {"data": name, "made": MADE_FROM[kind], **found["mean"]}
        for name, record in data.items()
        for kind, found in _record(record)["scenarios"]["untrained"]["made_from"].items()
    ]
    return _table(columns, rows, words=2)


def _targets() -> str:
    def shown(row: Mapping[str, Any], value: float) -> str:
        scale, digits = {"%": (100, 2), "points": (100, 2), "M": (1e-6, 2)}.get(row["unit"], (1, 3))
        return f"{value * scale:.{digits}f} {row['unit']}".strip()

    columns: dict[str, Cell] = {
        "what": lambda row: row["name"],
        "measured": lambda row: shown(row, row["value"]),
        "95 % interval": lambda row: "-".join(f"{100 * x:.1f}" for x in row["interval"] or ()),
        "target": lambda row: ("≥ " if row["at_least"] else "≤ ") + shown(row, row["bound"]),
        "met": lambda row: "yes" if row["met"] else "**no**",
    }
    return _table(columns, [row for row in _record("router_bench")["targets"] if row["value"] is not None])


def _router_peers() -> str:
    """Ways to choose an adapter by a prompt, on the same prompts."""
    columns: dict[str, Cell] = {
        "way": lambda row: row["name"],
        "tasks": lambda row: str(len(row["tasks"])),
        "accuracy": _percent("accuracy", 1),
        "AUROC": _number("auroc", 3),
        "false routes": _percent("false_routes", 1),
        "ms per prompt": _number("prompt_ms", 2),
        "needs": lambda row: row["needs"],
    }
    found = _record("router_peers")["scenarios"]["peers"].items()
    return _table(columns, [{"name": name, **row} for name, row in found if name != "seconds" and "skipped" not in row])


def _demo() -> str:
    methods = {
        "base model": "base",
        "base, chat template": "base_chat",
        "task's own adapter": "own_adapter",
        "DLP-LoRA": "dlp",
    }
    accuracy = _record("demo")["accuracy"]
    mean = {key: sum(own[key] for own in accuracy.values()) / len(accuracy) for key in methods.values()}
    columns: dict[str, Cell] = {"task": lambda row: row["task"]}
    columns |= {title: _percent(key, 0) for title, key in methods.items()}
    return _table(columns, [{"task": task, **own} for task, own in accuracy.items()] + [{"task": "mean", **mean}])


METHODS = (*MAIN, "never-abstain")


def _means(name: str) -> str:
    """Means over the tasks of choice and over the others, with their intervals."""
    record = _record(name)
    groups = {"accuracy": "mcq", "bleu": "qa", "rouge1": "qa", "rougeL": "qa"}
    sizes = {
        kind: sum(task["kind"] == kind for task in record["data"]["tasks"].values()) for kind in set(groups.values())
    }

    cell = partial(_mean_and_interval, record)
    choices = {
        name: [own["accuracy_loglik"] for own in scores.values() if "accuracy_loglik" in own]
        for name, scores in record["scores"].items()
    }
    columns: dict[str, Cell] = {
        "method": lambda row: label(row["method"]),
        f"accuracy, {sizes['mcq']} tasks": cell("accuracy"),
        f"likeliest choice, {len(next(iter(choices.values())))} of them": lambda row: (
            f"{100 * sum(choices[row['method']]) / len(choices[row['method']]):.1f}"
        ),
        f"BLEU, {sizes['qa']} tasks": cell("bleu"),
        "ROUGE-1": cell("rouge1"),
        "ROUGE-L": cell("rougeL"),
    }
    return _table(columns, [{"method": name} for name in METHODS if name in record["scores"]])


def _mean_and_interval(record: Mapping[str, Any], metric: str) -> Cell:
    def text(row: Mapping[str, Any]) -> str:
        pools, scale = record["composites"], 1 if metric == "bleu" else 100
        (pool,) = (name for name in pools if metric in pools[name][row["method"]])
        value = pools[pool][row["method"]][metric]
        low, high = record["composite_intervals"][pool][row["method"]][metric]
        return f"{scale * value:.1f} ({scale * low:.1f}-{scale * high:.1f})"

    return text


def _by_seed(name: str) -> str:
    """Means over tasks with each seed of the training, and of all with their interval."""
    record = _record(name)
    kinds = {task: own["kind"] for task, own in record["data"]["tasks"].items()}

    def of_seed(seed: str, metric: str, scale: int) -> Cell:
        def text(row: Mapping[str, Any]) -> str:
            scores = record["by_seed"][seed][row["method"]]
            values = [scores[task][metric] for task, kind in kinds.items() if (kind == "mcq") == (metric == "accuracy")]
            return f"{scale * sum(values) / len(values):.1f}"

        return text

    columns: dict[str, Cell] = {"method": lambda row: label(row["method"])}
    for title, metric, kind in (("accuracy", "accuracy", "mcq"), ("ROUGE-L", "rougeL", "qa")):
        num_tasks = sum(own == kind for own in kinds.values())
        for seed in record["by_seed"]:
            columns[f"{title} of {num_tasks} tasks, seed {seed}"] = of_seed(seed, metric, 100)
        columns[f"mean {title}"] = _mean_and_interval(record, metric)
    return _table(columns, [{"method": name} for name in METHODS if name in record["scores"]])


def _short_means(name: str) -> str:
    """The means over tasks alone, of 100."""
    record = _record(name)

    def cell(pool: str, metric: str, scale: int) -> Cell:
        return lambda row: f"{scale * record['composites'][pool][row['method']][metric]:.1f}"

    columns: dict[str, Cell] = {
        "mean of tasks": lambda row: label(row["method"]),
        "accuracy": cell("composite-17", "accuracy", 100),
        "BLEU": cell("composite-9", "bleu", 1),
        "ROUGE-L": cell("composite-9", "rougeL", 100),
    }
    return _table(columns, [{"method": name} for name in MAIN if name in record["scores"]])


def _short_peers() -> str:
    """The methods of PEFT beside ours."""
    names = {"dlp-lora": "DLP-LoRA", "peft one adapter": "PEFT, one adapter", "peft arrow": "PEFT Arrow"}
    rows = [{**row, "label": names[row["name"]]} for row in _record("peers")["rows"] if row["name"] in names]
    columns: dict[str, Cell] = {
        "over the base": lambda row: row["label"],
        "time per token": _number("ratio", 2),
        "peak memory": _number("memory_ratio", 2),
    }
    return _table(columns, rows)


def _teacher_forced(name: str) -> str:
    """What the paper's code measures, as means over the tasks, and the free answers of the same methods."""
    record = _record(name)
    titles = {"accuracy": "accuracy", "bleu_letters": "BLEU of letters", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}
    rows = []
    for method in record["teacher_forced"]:
        found: dict[str, Any] = {"method": f"{label(method)}, teacher-forced"}
        for pool, means in record["teacher_forced_composites"].items():
            for metric in means[method].keys() & titles.keys():
                low, high = record["teacher_forced_composite_intervals"][pool][method][metric]
                found[metric] = f"{100 * means[method][metric]:.1f} ({100 * low:.1f}-{100 * high:.1f})"
        rows.append(found)
    columns: dict[str, Cell] = {"method": lambda row: row["method"]}
    columns |= {title: partial(lambda row, metric: row[metric], metric=metric) for metric, title in titles.items()}
    return _table(columns, rows)


def _differences(name: str) -> str:
    """What DLP-LoRA's means differ by from those of other methods, in points of 100 (BLEU: of its own scale)."""
    record = _record(name)["differences"]

    def cell(metric: str) -> Cell:
        def text(row: Mapping[str, Any]) -> str:
            (found,) = (own[metric] for own in record[row["pair"]].values() if metric in own)
            value, (low, high) = found["value"], found["interval"]
            scale = 1 if metric == "bleu" else 100
            return f"{scale * value:+.2f} ({scale * low:+.2f} to {scale * high:+.2f})"

        return text

    titles = {"accuracy": "accuracy", "bleu": "BLEU", "rouge1": "ROUGE-1", "rougeL": "ROUGE-L"}
    columns: dict[str, Cell] = {
        "difference": lambda row: " − ".join(label(name) for name in row["pair"].split(" - ")),
        **{title: cell(metric) for metric, title in titles.items()},
    }
    return _table(columns, [{"pair": pair} for pair in record])


def _by_task(name: str) -> str:
    """Accuracy, or ROUGE-L where there is no choice, of each task, beside what guessing gets right."""
    record = _record(name)

    def cell(method: str) -> Cell:
        def text(row: Mapping[str, Any]) -> str:
            found = record["scores"][method][row["task"]]
            return f"{100 * found.get('accuracy', found.get('rougeL')):.1f}"

        return text

    columns: dict[str, Cell] = {
        "task": lambda row: row["task"],
        "measure": lambda row: "accuracy" if row["kind"] == "mcq" else "ROUGE-L",
        "chance": lambda row: f"{100 * row['chance']:.1f}" if row["chance"] is not None else "–",
        "majority": lambda row: f"{100 * row['majority']:.1f}" if row["majority"] is not None else "–",
        **{label(method): cell(method) for method in METHODS if method in record["scores"]},
    }
    tasks = sorted(record["data"]["tasks"].items(), key=lambda task: (task[1]["kind"], task[0]))
    return _table(columns, [{"task": name, **about} for name, about in tasks], words=2)


SERIAL = ("base", "oracle", "whole", "prompt-only", "dlp", "by-sentence", "recompute", "apart", "alone")


def _who(row: Mapping[str, Any]) -> str:
    """Who chooses in a method, or what the main ones are called."""
    return label(row["method"]) if row["method"] in MAIN else about(row["method"])


def _with_interval(found: Mapping[str, Any], key: str, digits: int) -> str:
    """A share with its interval, in percent."""
    low, high = found["interval"]
    return f"{100 * found[key]:.{digits}f} ({100 * low:.{digits}f}-{100 * high:.{digits}f})"


def _serial() -> str:
    """Several questions in one prompt: how many are answered right."""
    record = _record("tasks26/record")["serial"]

    def right(step: str) -> Cell:
        return lambda row: _with_interval(record[step][row["method"]], "accuracy", 1)

    columns: dict[str, Cell] = {"method": _who}
    columns |= {f"{step.removeprefix('serial-')} questions": right(step) for step in record}
    return _table(columns, [{"method": name} for name in SERIAL])


def _serial_details() -> str:
    """Several questions in one prompt: those after the first that are right, those routed right, and time."""
    record = _record("tasks26/record")["serial"]

    def cell(step: str, key: str, scale: float, digits: int) -> Cell:
        return lambda row: f"{scale * record[step][row['method']][key]:.{digits}f}"

    columns: dict[str, Cell] = {"method": _who}
    for step in record:
        n = step.removeprefix("serial-")
        columns |= {
            f"{n}: later ones": cell(step, "accuracy_later", 100, 1),
            f"{n}: routed": cell(step, "routed", 100, 0),
            f"{n}: seconds": cell(step, "seconds", 1, 2),
        }
    return _table(columns, [{"method": name} for name in SERIAL])


def _dependent() -> str:
    """Prompts whose second part needs the first, with an adapter for them: right answers of each kind, by each way."""
    scores = _record("dependent")["banks"]["with two_steps"]

    def right(way: str) -> Cell:
        return lambda row: _with_interval(scores[way][row["kind"]], "right", 0)

    columns: dict[str, Cell] = {"kind": lambda row: row["kind"].replace("_", " ")}
    columns |= {f"`{way}`" if way != "by-sentence" else "by sentence": right(way) for way in scores}
    columns["cut"] = lambda row: f"{100 * scores['apart'][row['kind']]['cut']:.0f} %"
    return _table(columns, [{"kind": kind} for kind in scores["apart"]])


def _mixtures(part: str, kind: str) -> str:
    """Questions that need two adapters: the best single adapter beside each group's best mixture."""
    found = _record("mixtures")[part]
    groups = {
        "base": "base model",
        "single": "best single adapter",
        "renormalised": "routed, renormalised",
        "paper": "routed, weights of Eq. 5",
        "pair": "both, fixed weights",
    }
    rows = [
        {"task": name, **{group: own["best"][group]["right"] for group in groups}, "weights": own["best"]["pair"]}
        for name, own in found["tasks"].items()
        if own["kind"] == kind
    ]
    mean = {group: sum(row[group] for row in rows) / len(rows) for group in groups}
    columns: dict[str, Cell] = {"questions of": lambda row: row["task"].replace("_", " ")}
    columns |= {title: _percent(group, 0) for group, title in groups.items()}
    columns["their weights"] = lambda row: (
        row["weights"]["method"].removeprefix("the pair, ") if row["weights"] else "–"
    )
    return _table(columns, [*rows, {"task": "mean", **mean, "weights": None}])


def _learning_curve() -> str:
    """Right answers to held-out training questions, by learning rate and passes over the examples."""
    found = _record("learning_curve")
    names = {"own": "each task's own, r 8", "lora-r64": "one for all tasks, r 64"}
    rows = [{**row, **{task: scores["accuracy"] for task, scores in row["scores"].items()}} for row in found["rows"]]
    columns: dict[str, Cell] = {
        "adapters": lambda row: names[row["kind"]],
        "learning rate": lambda row: f"{row['learning_rate']:g}",
        "epochs": lambda row: str(row["epochs"]),
        **{task: _percent(task, 0) for task in found["kinds"]},
        "mean": _percent("mean", 1),
    }
    return _table(columns, rows)


ABLATIONS = (
    *("dlp", "oracle", "base", "never-abstain", "top1", "p0.3", "p0.9", "p1.0", "paper-weights", "prompt-only"),
    *("recompute", "by-sentence", "uniform", "random"),
)


def _ablations() -> str:
    """Each method's means, and what they differ by from DLP-LoRA's on the same questions."""
    record = _record("ablations")
    pools = {metric: pool for pool, own in record["composites"].items() for metric in own["dlp"]}

    def mean(metric: str) -> Cell:
        scale = 1 if metric == "bleu" else 100
        return lambda row: f"{scale * record['composites'][pools[metric]][row['method']][metric]:.1f}"

    def apart(metric: str) -> Cell:
        def text(row: Mapping[str, Any]) -> str:
            sign, pair = 1, f"{row['method']} - dlp"
            if pair not in record["differences"]:
                sign, pair = -1, f"dlp - {row['method']}"
            if pair not in record["differences"]:
                return "–"
            found = record["differences"][pair][pools[metric]][metric]
            low, high = sorted(100 * sign * x + 0.0 for x in found["interval"])  # 0, not -0
            return f"{100 * sign * found['value'] + 0.0:+.2f} ({low:+.2f} to {high:+.2f})"

        return text

    columns: dict[str, Cell] = {
        "method": _who,
        "accuracy": mean("accuracy"),
        "minus DLP-LoRA": apart("accuracy"),
        "ROUGE-L": mean("rougeL"),
        "difference": apart("rougeL"),
    }
    return _table(columns, [{"method": name} for name in ABLATIONS if name in record["scores"]])


def _families(*statuses: str) -> str:
    """Model families by what does not hold for them, and why: those for which all holds first."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, family in _record("families")["families"].items():
        if family["status"] in statuses:
            reasons = family["limits"].values() if family["status"] == "supported" else [family["reason"]]
            why = "; ".join(dict.fromkeys(map(_shortened, reasons)))
            alike.setdefault((_promises(family["limits"]), why), []).append(f"`{name}`")
    columns: dict[str, Cell] = {"families": lambda row: row["families"]}
    if "supported" in statuses:
        columns["what does not hold"] = lambda row: row["limits"] or "–"
    columns["why"] = lambda row: row["why"] or "–"
    rows = [{"families": ", ".join(names), "limits": limits, "why": why} for (limits, why), names in alike.items()]
    rows.sort(key=lambda row: (row["limits"] != "", -len(row["families"])))
    return _table(columns, rows, words=len(columns))


def _promises(limits: Mapping[str, str]) -> str:
    """The promises that do not hold; the KV policy is named where it is one alone."""
    policies: dict[str, list[str]] = {}
    for promise in limits:
        name, _, policy = promise.partition(", ")
        policies.setdefault(name, []).append(policy)
    return ", ".join(
        name if len(each) > 1 or each == [""] else f"{name} (`{each[0]}`)" for name, each in policies.items()
    )


def _shortened(reason: str) -> str:
    """The reason without whom it is said of, and what to do."""
    clause = re.split(r", so |; | \(|: it is", reason)[0]
    return re.sub(r"^(it|\w*[A-Z]\w+|\S*\.\S+|kv_policy='recompute') ", "", clause)


def _serve(name: str) -> Callable[[], str]:
    """Tokens a second and latency of servers, by the number of streams."""
    columns: dict[str, Cell] = {
        "server, load": lambda row: row["name"],
        "streams": lambda row: str(row["streams"]),
        "tokens/s": _number("tokens_per_s", 1),
        "spread": _spread("tokens_per_s", 1),
        "over one stream": _number("speedup", 2),
        "first token, ms": _percentiles("first_ms"),
        "between tokens, ms": _percentiles("gap_ms"),
    }
    return lambda: _table(columns, [row for row in _record(name)["rows"] if "tokens_per_s" in row])


def _llama_cpp_start() -> str:
    """Start-up and memory of the servers beside llama.cpp's."""
    columns: dict[str, Cell] = {
        "backend": VARIANT["variant"],
        "start, s": _number("start_s", 1),
        "memory, MB": _number("resident_mb", 0),
        "after all answers, MB": _number("after_mb", 0),
    }
    return _table(columns, _record("llama_cpp")["starts"])


def _percentiles(key: str) -> Cell:
    return lambda row: " / ".join(f"{row[f'{key}_p{share}']:,.0f}" for share in (50, 95, 99))


def _serve_one() -> str:
    """The time of a token over one stream, beside the engine and the base in one process."""
    columns: dict[str, Cell] = {
        "load": lambda row: row["name"].partition(", ")[2],
        "over `engine.stream`": _number("over_engine", 3),
        "spread": _spread("over_engine"),
        "over the base's `generate`": _number("over_base", 3),
        "its spread": _spread("over_base"),
    }
    return _table(columns, [row for row in _record("serve")["rows"] if "over_engine" in row])


def _serve_more() -> str:
    """Waiting, memory, start, adapters on disk."""
    shown = {
        "longest_ms": "longest wait {:,.0f} ms",
        "over_chunk": "{:.2f} of a chunk and a step",
        "mb_per_request": "{:.1f} MB a request",
        "start_s": "{:.1f} s",
        "resident_mb": "{:,.0f} MB",
        "first_from_disk_ms": "first token after {:,.0f} ms",
        "first_again_ms": "the next time after {:,.0f}",
    }
    columns: dict[str, Cell] = {
        "measured": lambda row: row["name"],
        "found": lambda row: ", ".join(text.format(row[key]) for key, text in shown.items() if key in row),
    }
    rows = [row for row in _record("serve")["rows"] if shown.keys() & row.keys()]
    return _table(columns, rows, words=2)


def _soak() -> str:
    """What a soak counted."""
    (row,) = _record("soak")["rows"]
    shown = {
        "minutes": row["minutes"],
        "clients": row["name"].split()[0],
        "answers": f"{row['answers']:,}",
        "wrong answers": row["wrong"],
        "clients that left": row["left"],
        "adapters loaded or unloaded": row["changes"],
        "memory, from the first to the last third": f"{100 * row['growth']:+.1f} %",
        "rows, threads, sockets of the idle server afterwards": ", ".join(
            str(row[f"{what}_after"]) for what in ("rows", "threads", "sockets")
        ),
        "restart after kill -9": f"{row['restart_s']:.1f} s",
    }
    return markdown_grid(["counted", "found"], ([what, str(value)] for what, value in shown.items()), num_labels=1)


TABLES: dict[str, Callable[[], str]] = {
    "families-supported": partial(_families, "supported"),
    "families-refused": partial(_families, "refused", "not built"),
    "tasks26": partial(_means, "tasks26/record"),
    "tasks13-seeds": partial(_by_seed, "tasks13/record"),
    "tasks26-short": partial(_short_means, "tasks26/record"),
    "peers-short": _short_peers,
    "tasks26-teacher-forced": partial(_teacher_forced, "tasks26/record"),
    "tasks26-differences": partial(_differences, "tasks26/record"),
    "tasks26-by-task": partial(_by_task, "tasks26/record"),
    "tasks26-serial": _serial,
    "tasks26-serial-details": _serial_details,
    "dependent": _dependent,
    "mixtures": partial(_mixtures, "made", "made"),
    "learning-curve": _learning_curve,
    "ablations": _ablations,
    "demo": _demo,
    "router-targets": _targets,
    "router-peers": _router_peers,
    "untrained": _untrained,
    "decode": _decoding("decode"),
    "decode-batch8": _decoding("decode_batch8"),
    "decode-amx": _decoding("decode_amx"),
    "decode-amx-batch8": _decoding("decode_amx_batch8"),
    "switch-context": _rows(
        "switch_context",
        {
            "variant": lambda row: row["name"],
            "ms a step": _number("pass_ms", 0),
            "more than a token, ms": _number("extra_ms", 0),
            "of a sentence of 25 tokens": _percent("over_sentence", 0),
        },
    ),
    "decode-all-linear": _decoding("decode_all_linear"),
    "paths": _decoding("paths"),
    "speed-targets": _speed_targets,
    "serve": _serve("serve"),
    "serve-one": _serve_one,
    "serve-more": _serve_more,
    "serve-peers": _serve("serve_peers"),
    "llama-cpp": _rows(
        "llama_cpp",
        {
            "backend": VARIANT["variant"],
            "KV policy": lambda row: row["kv_policy"],
            "streams": lambda row: str(row["streams"]),
            "tokens/s": _number("tokens_per_s", 1),
            "spread": _spread("tokens_per_s", 1),
            "over PyTorch, float32": _number("over_local", 2),
            "its spread": _spread("over_local"),
            "first token, ms": _percentiles("first_ms"),
            "between tokens, ms": _percentiles("gap_ms"),
        },
        words=2,
    ),
    "llama-cpp-start": _llama_cpp_start,
    "scale-check": lambda: runpy.run_path(str(ROOT / "scripts" / "estimate_scale.py"))["check_table"](),
    "soak": _soak,
    "prefill-xeon": _rows(
        "prefill_xeon",
        {**VARIANT, "ms": _number("ms", 0), **RATIO, "error of logits": _percent("logit_error", 1)},
        words=2,
    ),
    "prefill": _rows("prefill_batch4", {**VARIANT, "ms": _number("ms", 0), **RATIO, **MEMORY}, words=2),
    "switch": _rows(
        "switch",
        {
            "variant": VARIANT["variant"],
            "router": _number("route_ms", 2),
            "policy": _number("policy_ms", 2),
            "fusing": _number("fuse_ms", 2),
            "whole switch": _number("switch_ms", 2),
        },
    ),
    "bank": _rows(
        "bank",
        {
            "bank": VARIANT["variant"],
            "share of parameters": _percent("share_of_parameters", 1),
            **STEP,
            "start-up, s": _number("load_s", 2),
            "kept, MB": _number("kept_mb", 0),
            "resident, MB": _number("resident_mb", 0),
            "fusing 3, ms": lambda row: "–" if row["num_adapters"] < 3 else _number("hit_ms", 2)(row),
            "3 from disk, ms": _number("miss_ms", 1),
        },
    ),
    "routers": _rows(
        "routers",
        {
            "variant": VARIANT["variant"],
            **STEP,
            "router's parameters": _number("router_parameters", 0),
            "router, ms a sentence": _number("route_ms", 2),
        },
    ),
    "peers": _rows("peers", {"method": VARIANT["variant"], **STEP, "first token, ms": _number("ttft_ms", 0), **MEMORY}),
    "train": _rows("train", TRAIN, words=2),
    "train-long": _rows("train_long", TRAIN, words=2),
}

if __name__ == "__main__":
    main()
