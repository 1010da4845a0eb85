"""An evaluation as people read it: verdict, choice, every number, pictures, and what is unknown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.page import bullets, esc, grid, solid, table, thumbnails
from tools.program import refuse
from tools.verdict import FORMAT, conclusion
from train_lora import NOT_JSON, Record, counted, natural_key

if TYPE_CHECKING:
    from tools.grid import Grid

PICTURE = 128  # pixels of a picture in the table of arms
# How an arm's scores are called, what sees them, and what they are called in eval.json.
SCORES = (
    ("like the subject", "vision", "fidelity"),
    ("… more than the base", "vision", "fidelity_over_base"),
    ("like the subject", "clip", "clip_fidelity"),
    ("true to the prompt", "clip", "text_fit"),
    ("… more than the base", "clip", "text_fit_over_base"),
    ("drift", "vision", "drift"),
    ("drift of the class", "vision", "class_drift"),
    ("leak into the class", "vision", "leak"),
    ("diversity", "vision", "diversity"),
    ("CMMD", "vision", "cmmd"),
    ("KID", "vision", "kid"),
)
MEANINGS = (
    "Like the subject: mean cosine with the training pictures, 1 at most.",
    "True to the prompt: cosine with the prompt, trigger words left out; 0.2 to 0.35 is usual.",
    "Drift: how far pictures without the subject went from the base's, same seed.",
    "Leak: how much nearer to the subject pictures of its class went that do not ask for it.",
    "Diversity: 1 less the cosine of two pictures of one prompt.",
    "CMMD: distance of the pictures as a set from those of training; below 0 is chance.",
    "Quality: the geometric mean of the way gone from base to subject and of truth to the prompt.",
    "± gives the interval that holds the truth in 95 of 100 cases; the unit is the prompt.",
)


def plus_minus(score: Record | None) -> str:
    """Show a mean with its half width."""
    if not score:
        return "-"
    width = "" if score["half_width"] is None else f" ± {score['half_width']:.3f}"
    return f"{score['mean']:z.3f}{width}"


def sections(result: Record, pictures: str, level: int = 2) -> Iterator[str]:
    """Write the parts of a page, the answer first, with headings of a level."""

    def part(title: str, content: str) -> str:
        return f"<h{level}>{title}</h{level}>{content}"

    yield f"<p><strong>{esc(conclusion(result))}</strong></p>"
    if result["recommended"]:
        yield part("Which checkpoint, at which strength", choice(result))
    yield part("Every number", numbers(result))
    yield part("Learned by heart?", by_heart(result))
    if pictures:
        yield part("Pictures", pictures)
    yield part("What these pictures cannot tell", bullets(result["doubts"]))
    yield part("What the numbers mean", bullets(MEANINGS))


def read_result(path: Path) -> Record:
    """Read what tools/evaluate.py wrote."""
    try:
        said: Any = json.loads(path.read_text(encoding="utf-8"))
        if said["format"] != FORMAT:
            raise ValueError(said["format"])
        list(sections(said, ""))  # whatever is missing is missed here
    except (OSError, LookupError, *NOT_JSON) as error:
        expected = "an eval.json of tools/evaluate.py"
        raise refuse(path, expected, f"something else ({error!r:.80})") from error
    return dict(said)


def choice(result: Record) -> str:
    """Show quality over checkpoints and strengths, and how one was chosen."""
    told = result["quality_on_other_prompts"]
    asked = counted(told["prompts"], "prompt")
    words = (
        "The earliest checkpoint, and of it the lowest strength, within one standard error of the "
        f"best. Quality of {result['recommended']} on {asked} that did not "
        f"choose it: {plus_minus(told)}."
    )
    if result["prompts"]["subject"] < 8:
        words = words.replace(" that did not choose it", "")
    arms = result["arms"][1:]
    strengths = sorted({arm["strength"] for arm in arms})
    loras = sorted({arm["lora"] for arm in arms}, key=natural_key)
    found = {(arm["lora"], arm["strength"]): solid(quality_cell(arm, result)) for arm in arms}
    body = [[lora, *(found.get((lora, w), "-") for w in strengths)] for lora in loras]
    marks = "* recommended, ~ cannot be told from the best, ! see what speaks against it"
    return (
        f"<p>{esc(words)}</p>{table(['quality', *map('{:g}'.format, strengths)], body)}"
        f'<p class="told">{esc(marks)}</p>{differences(result)}'
    )


def quality_cell(arm: Record, result: Record) -> str:
    """Show a quality, and what there is to say of it."""
    marks = "*" if arm["arm"] == result["recommended"] else ""
    marks += "~" if arm["arm"] in result["not_distinguishable"] and not marks else ""
    marks += "!" if arm["flags"] else ""
    return f"{plus_minus(arm.get('quality'))} {marks}".rstrip()


def differences(result: Record) -> str:
    """Show by how much arms differ, and how often chance alone makes as much."""
    names = {"quality": "quality", "fidelity": "like the subject", "text_fit": "true to the prompt"}
    gaps = {arm["arm"]: arm.get("against_recommended", {}) for arm in result["arms"][1:]}
    gaps.pop(result["recommended"])
    there = [name for name in names if any(name in each for each in gaps.values())]
    body = [
        [solid(arm), *(difference(each[name]) if name in each else "-" for name in there)]
        for arm, each in gaps.items()
    ]
    head = (f"less {result['recommended']}", *(names[name] for name in there))
    return table(head, body) if body else ""


def difference(gap: Record) -> str:
    """Show one difference."""
    return solid(f"{plus_minus(gap)} (p {gap['p']:.3f})")


def numbers(result: Record) -> str:
    """Show all scores of all arms, each with the name of what saw it."""
    names = {kind: said["model"] if said else "" for kind, said in result["features"].items()}
    there = [each for each in SCORES if any(each[2] in arm for arm in result["arms"])]
    head = ["", "against it", *(f"{word} ({names[kind]})" for word, kind, _ in there)]
    body = [
        [
            *(solid(arm["arm"]), ", ".join(arm["flags"])),
            *(solid(plus_minus(arm.get(key))) for _, _, key in there),
        ]
        for arm in result["arms"]
    ]
    told = f"Training pictures are alike by {result['ceiling']:.3f}"
    if result["two_seeds"] is not None:
        told += f"; two seeds of the base are {result['two_seeds']:.3f} apart, the scale of drift"
    counts = result["prompts"]
    asked = f"{counted(counts['subject'], 'prompt')} of the subject, {counts['prior']} without it"
    seeds = counted(result["seeds"], "seed")
    told += f". {asked}, {seeds}, {counted(result['training_images'], 'training picture')}."
    fids = [
        (a["arm"], a["fid"]["value"], a["fid"]["by_chance"]) for a in result["arms"] if "fid" in a
    ]
    fid = table(("", f"FID ({names['vision']})", "of one set with itself, at most"), fids)
    return f"<p>{esc(told)}</p>{table(head, body)}{fid if fids else ''}"


def by_heart(result: Record) -> str:
    """Show what speaks for copies of training pictures."""
    arms = [arm for arm in result["arms"] if arm["copying"]]
    if not arms:
        return "<p>Too few training pictures to tell.</p>"
    held = "above_heldout" in arms[0]["copying"]
    head = ["", "nearer than two of training", "expected", "by chance at most"]
    head += ["above pictures held back"] * held + ["copies by their pixels"]
    body = []
    for arm in arms:
        told, cells = arm["copying"], [solid(arm["arm"])]
        shares = ("nearer_than_training", "expected", "by_chance_at_most")
        cells += [f"{told[name]:.0%}" for name in shares]
        if held:
            above, chance = told["above_heldout"], told["above_heldout_p"]
            cells.append(f"{above:.0%} (p {chance:.3f}; half is chance)")
        pairs = ", ".join(f"{each['file']} of {each['of']}" for each in arm["copies"][:5])
        body.append([*cells, pairs or "none"])
    return table(head, body)


def pictures_of(judged: Grid, most_bytes: int, at: Callable[[int], None]) -> str:
    """Lay out one picture of every prompt for each arm: the first seed."""
    firsts: dict[tuple[str, str], Path] = {}
    for (arm, prompt, _), file in sorted(judged.files.items(), key=lambda item: item[0][2]):
        firsts.setdefault((arm.name, prompt), file)
    made = thumbnails(firsts, most_bytes, at, PICTURE)
    lines = [
        (
            solid(arm.name),
            [
                (made.get((arm.name, p)), f"{arm.name}, {said['text']}")
                for p, said in judged.prompts.items()
            ],
        )
        for arm in judged.arms
    ]
    return grid([prompt["text"] for prompt in judged.prompts.values()], lines)
