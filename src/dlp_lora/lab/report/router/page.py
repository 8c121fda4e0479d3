"""The page of a router: sections of tables and pictures, in order."""

from collections.abc import Sequence

from dlp_lora.lab.report.markup import Block, Picture, Section, section
from dlp_lora.lab.report.record import at
from dlp_lora.lab.report.router import tables
from dlp_lora.lab.report.router.record import Found, scenario_of


def router_title(record: Found) -> str:
    """What the page is headed."""
    return f"The router on {len(record['data']['tasks'])} tasks"


def router_sections(record: Found, pictures: Sequence[Picture]) -> tuple[Section, ...]:
    """The report's sections, in order; what was not measured is said, not left out."""
    drawn = {picture.name: picture for picture in pictures}

    def of(title: str, scenario: str, *blocks: Block | None) -> Section:
        skipped = at(record, "scenarios", scenario, "skipped")
        return section(title, f"Not measured: {skipped}." if skipped else None, *blocks)

    return (
        section("Targets", tables.in_short(record), tables.targets(record)),
        of("Prompts", "prompts", tables.prompts(record), drawn.get("lengths"), tables.by_task(record)),
        of("Where prompts went", "prompts", drawn.get("confusion-whole"), drawn.get("confusion-sentence")),
        of("Calibration and abstention", "prompts", drawn.get("reliability"), drawn.get("abstention")),
        of("Answers", "answers", tables.accuracies("Openings of later sentences", scenario_of(record, "answers"))),
        of("Conversations", "conversations", drawn.get("conversations"), *tables.conversation_tables(record)),
        of("Several questions in one prompt", "serial", tables.serial(record), tables.hysteresis(record)),
        of("Which prompts ask several", "questions", tables.questions(record)),
        of("Changes within a sentence", "junctions", tables.junctions(record)),
        of("Out of domain: extra tasks", "outside", drawn.get("false-routes"), *tables.outside(record, "outside")),
        of("Out of domain: tasks left out", "left_out", *tables.outside(record, "left_out")),
        of("Robustness", "robustness", tables.robustness(record)),
        of("Among instructions", "instructions", tables.instructions(record)),
        of("Without training", "untrained", tables.untrained(record)),
        of("Other ways to choose", "peers", tables.peers(record)),
        of("Scale", "scale", tables.scale(record, "scale"), tables.scale(record, "synthetic")),
        of("New tasks", "extension", tables.added(record), tables.removed(record)),
        of("Mixture skew", "skew", tables.skew(record)),
        of("How much the data can carry", "ceilings", tables.ceilings(record)),
        of("Time", "timing", tables.timing(record)),
        section("How it was made", tables.making(record)),
    )
