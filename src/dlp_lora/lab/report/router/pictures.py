"""The pictures of a router: its confusion, how sure it is, and what that is worth."""

from collections.abc import Iterator, Mapping
from itertools import islice

from dlp_lora.lab.records.table import Measure
from dlp_lora.lab.report.charts import confusion, curves
from dlp_lora.lab.report.markup import Picture
from dlp_lora.lab.report.paper import SPELLINGS
from dlp_lora.lab.report.record import at
from dlp_lora.lab.report.router.record import Found, measure_of, parts_of, scenario_of

NUM_CURVES = 4
MIN_SHARE = 0.005  # of the samples: a bin with fewer is not drawn


def router_pictures(record: Found) -> tuple[Picture, ...]:
    """Draws what the record has numbers for.

    Raises:
        DLPLoRAError: if matplotlib is not installed.
    """
    drawn = (
        *_confusions(record),
        _lengths(record),
        _conversations(record),
        _reliability(record),
        _abstention(record),
        _false_routes(record),
    )
    return tuple(picture for picture in drawn if picture is not None)


def _confusions(record: Found) -> Iterator[Picture]:
    for kind, name in (("whole", "confusion-whole"), ("random sentence", "confusion-sentence")):
        if counts := _labelled(record, at(record, "scenarios", "prompts", "confusion", kind)):
            what = "whole prompts" if kind == "whole" else "single sentences, drawn at random"
            caption = f"Rows: tasks. Columns: the router's first choice for {what}."
            yield Picture(name=name, caption=caption, svg=confusion(counts, name=name))


def _labelled(record: Found, counts: Mapping[str, Mapping[str, float]] | None) -> dict[str, dict[str, float]]:
    labels = {task: SPELLINGS.get(name, name) for task, name in record["data"]["labels"].items()}
    return {
        labels.get(task, task): {labels.get(name, name): count for name, count in row.items()}
        for task, row in (counts or {}).items()
    }


def _lengths(record: Found) -> Picture | None:
    found = dict(parts_of(record, "prompts"))
    cuts = {int(name.split()[0]): own for name, own in found.items() if name.endswith(" tokens")}
    if not cuts:
        return None
    ordered = [*((str(n), cuts[n]) for n in sorted(cuts)), ("whole", found["whole"])]
    points = [(float(i), measure_of(own)) for i, (_, own) in enumerate(ordered)]
    svg = curves(
        {"beginning of the prompt": points},
        across="tokens",
        up="accuracy, %",
        ticks={float(i): name for i, (name, _) in enumerate(ordered)},
        name="lengths",
    )
    return Picture(name="lengths", caption="Accuracy against the length of the context, with intervals.", svg=svg)


def _conversations(record: Found) -> Picture | None:
    series = {
        f"{kind} before it": [(float(n), measure_of(own)) for n, own in found.items()]
        for kind, found in parts_of(record, "conversations")
    }
    if not series:
        return None
    svg = curves(series, across="questions in the conversation", up="accuracy, %", name="conversations")
    return Picture(name="conversations", caption="Accuracy on the newest question, with intervals.", svg=svg)


def _reliability(record: Found) -> Picture | None:
    found = at(record, "scenarios", "prompts", "reliability")
    if not found:
        return None
    series = {
        f"{kind}, {100 * own['ece']:.1f} %": [
            (100 * b["confidence"], Measure(value=100 * b["accuracy"])) for b in own["bins"] if b["share"] > MIN_SHARE
        ]
        for kind, own in found.items()
    }
    svg = curves(series, across="confidence, %", up="accuracy, %", diagonal=True, name="reliability")
    caption = (
        "Reliability: accuracy against confidence, in bins; on the broken line a router is as sure as it is right. "
        "Beside the names: the calibration error."
    )
    return Picture(name="reliability", caption=caption, svg=svg)


def _abstention(record: Found) -> Picture | None:
    found = at(record, "scenarios", "prompts", "abstention")
    if not found:
        return None
    series = {
        kind: [(100 * p["coverage"], Measure(value=100 * p["accuracy"])) for p in points]
        for kind, points in found.items()
    }
    svg = curves(series, across="coverage: texts that are routed, %", up="accuracy of these, %", name="abstention")
    caption = "Abstention: accuracy on the texts that are routed, as the least sure are left to the base model."
    return Picture(name="abstention", caption=caption, svg=svg)


def _false_routes(record: Found) -> Picture | None:
    outside, left = scenario_of(record, "outside"), scenario_of(record, "left_out")
    found = {"extra tasks": outside, **{f"{name}": own for name, own in left.get("splits", {}).items()}}
    series = {
        kind: [(100 * p["coverage"], Measure(value=100 * p["false_routes"])) for p in own["abstention"]]
        for kind, own in islice(found.items(), NUM_CURVES)
        if "abstention" in own
    }
    if not series:
        return None
    svg = curves(
        series, across="coverage: the tasks' own prompts that are routed, %", up="false routes, %", name="false-routes"
    )
    caption = "Texts of no task that are routed all the same, against the share of the tasks' own that are."
    return Picture(name="false-routes", caption=caption, svg=svg)
