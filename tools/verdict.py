"""From scores to a verdict: which checkpoint at which strength, how sure, and what is not known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tools.intervals import (
    FEW_PROMPTS,
    FEW_SEEDS,
    Estimate,
    chance_of,
    compare,
    cubic,
    estimate,
    fid,
    gaussian,
    set_distance,
    sign_flip_share,
    simplest_of_the_best,
    vendi,
)
from tools.judging import FEW_IMAGES, Cells, Judge, rows_of
from train_lora import counted

if TYPE_CHECKING:
    from tools.grid import Arm
    from train_lora import Record

FORMAT = "lora-evaluation"
HALVES = 8  # prompts, from which on one half chooses and the other half tells
MANY = 50  # pictures on either side, from which on KID means something
COLLAPSED = 0.5  # of the base's diversity


def verdict_on(judge: Judge, *, with_fid: bool = False) -> Record:
    """Score all arms, and recommend one."""
    arms = judge.grid.arms
    joined = {arm: judge.quality(arm) for arm in arms}
    scored = {arm: score_arm(judge, arm, joined[arm], with_fid=with_fid) for arm in arms}
    told = {arm: judge.does_something(arm) for arm in arms[1:]}
    result: Record = {
        "format": FORMAT,
        "version": 1,
        "prompts": {role: len(judge.grid.role(role)) for role in ("subject", "prior", "memory")},
        "seeds": len(judge.grid.seeds),
        "training_images": len(judge.vision.train),
        "ceiling": round(judge.ceiling, 4),
        "two_seeds": two_seeds(judge),
        "does_nothing": [arm.name for arm, does in told.items() if does is False],
        "recommended": None,
    }
    candidates = [arm for arm in arms[1:] if told[arm] is not False]
    sound = [arm for arm in candidates if not scored[arm]["flags"]]
    if candidates and judge.subject:
        chosen = recommend(sound or candidates, joined)
        result |= chosen | {"front": front_of(candidates, scored)}
        for arm in arms[1:]:
            scored[arm]["against_recommended"] = differences(judge, arm, chosen["recommended"])
    return result | {"doubts": doubts(judge, scored), "arms": list(scored.values())}


def recommend(arms: Sequence[Arm], joined: Mapping[Arm, Cells]) -> Record:
    """Choose on half of the prompts by the one-standard-error rule, and report on the other half.

    Whoever reports on what he chose by reports too much.
    """
    prompts = list(joined[arms[0]])
    halves = (prompts[0::2], prompts[1::2]) if len(prompts) >= HALVES else (prompts, prompts)
    best, alike = simplest_of_the_best([pick(joined[arm], halves[0]) for arm in arms])
    return {
        "recommended": arms[best].name,
        "recommended_lora": arms[best].lora,
        "recommended_strength": arms[best].strength,
        "quality_on_other_prompts": as_record(estimate(pick(joined[arms[best]], halves[1]))),
        "not_distinguishable": [arms[number].name for number in alike],
    }


def pick(cells: Cells, prompts: Iterable[str]) -> Cells:
    """Take some of the prompts."""
    return {prompt: cells[prompt] for prompt in prompts}


def as_record(found: Estimate) -> Record:
    """Write an estimate down with as many digits as it can have."""
    return {k: round(v, 4) if isinstance(v, float) else v for k, v in vars(found).items()}


def with_prompts(cells: Cells) -> Record:
    """Write an estimate down, and the mean of each prompt."""
    means = {prompt: round(sum(v) / len(v), 4) for prompt, v in cells.items() if v}
    return {**as_record(estimate(cells)), "by_prompt": means}


# --- One arm ---


def score_arm(judge: Judge, arm: Arm, joined: Cells, *, with_fid: bool) -> Record:
    """Write down all that is measured of one arm."""
    memory = judge.grid.role("memory")
    scores = {
        "fidelity": judge.fidelity(arm),
        "fidelity_over_base": judge.above_base(judge.fidelity, arm),
        "clip_fidelity": judge.clip_fidelity(arm),
        "text_fit": judge.text_fit(arm),
        "text_fit_over_base": judge.above_base(judge.text_fit, arm),
        "drift": judge.drift(arm, judge.others),
        "class_drift": judge.drift(arm, judge.of_class),
        "leak": judge.leak(arm),
        "diversity": judge.diversity(arm),
        "nearest": judge.memory(arm, "subject"),
        "nearest_on_training_captions": judge.memory(arm, "memory"),
        "diversity_on_training_captions": judge.diversity(arm, memory),
        "quality": joined,
    }
    found = {name: with_prompts(cells) for name, cells in scores.items() if cells}
    head = {"arm": arm.name, "lora": arm.lora, "strength": arm.strength, "step": arm.step}
    record = {**head, **found, "copying": judge.copying(arm), **distances(judge, arm, with_fid)}
    record["copies"] = judge.copies.get(arm, [])
    return record | {"flags": flags_of(judge, arm, record)}


def distances(judge: Judge, arm: Arm, with_fid: bool) -> Record:
    """Compare an arm's pictures, as a set, with those of training."""
    train, (pictures, prompts) = judge.vision.train, rows_of(judge, arm)
    if len(set(prompts)) < 2 or len(train) < 2:
        return {}
    found: Record = {
        "cmmd": as_record(set_distance(gaussian, train, pictures, prompts)),
        "vendi": round(vendi(pictures), 2),
    }
    if min(len(train), len(pictures)) >= MANY:
        found["kid"] = as_record(set_distance(cubic, train, pictures, prompts))
    if with_fid:
        chance = chance_of(train, len(pictures), fid)
        found["fid"] = {"value": round(fid(train, pictures), 4), "by_chance": round(chance, 4)}
    return found


def flags_of(judge: Judge, arm: Arm, record: Record) -> list[str]:
    """Name what makes an arm no choice, however like the subject its pictures are."""
    if arm == judge.base:
        return []
    found, copying, scale = [], record["copying"], two_seeds(judge)
    base = judge.diversity(judge.base)
    if record["copies"] or (copying and copying["alarm"]):
        found.append("learned by heart")
    # Of a word that it does not know, the base draws anything, and so more than a subject can be.
    usual = min(filter(None, (scale, estimate(base).mean if base else None)), default=0.0)
    if base and record["diversity"]["mean"] < COLLAPSED * usual:
        found.append("always the same picture")
    if scale is not None and surely_above(record["drift"], scale):
        found.append("changes what it should not")
    return found


def surely_above(told: Record, limit: float) -> bool:
    """Tell whether all that the truth may be is above a limit; without an interval, the mean."""
    return bool(told["mean"] - (told["half_width"] or 0.0) > limit)


def two_seeds(judge: Judge) -> float | None:
    """Tell how far apart two pictures of the base are that only a seed tells apart."""
    pairs = judge.diversity(judge.base, judge.others)
    return round(estimate(pairs).mean, 4) if pairs else None


# --- Between arms ---


def differences(judge: Judge, arm: Arm, other: str) -> Record:
    """Compare two arms cell by cell; with each difference, how often chance alone makes one so."""
    (twin,) = [each for each in judge.grid.arms if each.name == other]
    found = {}
    scores = {"quality": judge.quality, "fidelity": judge.fidelity, "text_fit": judge.text_fit}
    for name, score in scores.items():
        if cells := score(arm):
            twins = score(twin)
            means = [sum(cells[p]) / len(cells[p]) - sum(twins[p]) / len(twins[p]) for p in cells]
            found[name] = as_record(compare(cells, twins)) | {"p": sign_flip_share(means)}
    return found


def front_of(arms: Sequence[Arm], scored: Mapping[Arm, Record]) -> list[str]:
    """List the arms that no other beats both in likeness and in truth to the prompt."""

    def place(arm: Arm) -> tuple[float, float]:
        fit = scored[arm].get("text_fit")
        return scored[arm]["fidelity"]["mean"], fit["mean"] if fit else 0.0

    def beaten(arm: Arm) -> bool:
        own = place(arm)
        return any(
            place(each) != own and all(a >= b for a, b in zip(place(each), own, strict=True))
            for each in arms
        )

    return [arm.name for arm in arms if not beaten(arm)]


# --- What is not known ---


def doubts(judge: Judge, scored: Mapping[Arm, Record]) -> list[str]:
    """Say what these pictures are too few, or of the wrong kind, to tell."""
    subject, train, seeds = len(judge.subject), len(judge.vision.train), len(judge.grid.seeds)
    asked, found = counted(subject, "prompt"), []
    if subject < FEW_PROMPTS or seeds < FEW_SEEDS:
        found.append(
            f"{asked} with {counted(seeds, 'seed')} give no interval: nothing can be concluded. "
            "Twelve prompts with four seeds tell much."
        )
    elif subject < HALVES:
        found.append(
            f"With fewer than {HALVES} prompts, what was chosen is reported on the prompts it was "
            "chosen by, and so somewhat too well."
        )
    if train < FEW_IMAGES:
        few = counted(train, "training picture")
        found.append(f"{few} cannot tell whether training pictures were learned by heart.")
    held = judge.vision.heldout
    if held is not None and len(held) < FEW_IMAGES:
        few = counted(len(held), "picture")
        found.append(f"{few} held back cannot tell that either; {FEW_IMAGES} or more can.")
    if not judge.others:
        found.append("No prompt is without the subject: what else changed is not known.")
    if judge.clip is None:
        found.append("Without --clip, a LoRA that ignores prompts is not found out.")
    gaps = [scored[arm].get("against_recommended", {}).get("quality") for arm in scored]
    seen = [gap["resolvable"] for gap in gaps if gap and gap["resolvable"]]
    if seen:
        found.append(f"Differences in quality below {max(seen):.2f} would likely not be seen.")
    if min(train, subject * seeds) < MANY:
        found.append(f"KID needs {MANY} pictures on either side, and FID thousands.")
    if len(scored) > 1:
        found.append("Files are compared, not recipes: another seed of training may turn it.")
    return found


def conclusion(result: Record) -> str:
    """Say in a sentence what follows."""
    trained: list[Any] = result["arms"][1:]
    if not trained:
        return "There is nothing but the base"
    if len(result["does_nothing"]) == len(trained):
        return "No LoRA here does anything that can be seen: none is nearer to the subject"
    if result["recommended"] is None:
        return "No prompt asks for the subject: nothing can be recommended"
    (chosen,) = [arm for arm in trained if arm["arm"] == result["recommended"]]
    if chosen["fidelity"]["half_width"] is None:
        return f"Too few pictures to tell; on average the best is {result['recommended']}"
    alike = [name for name in result["not_distinguishable"] if name != result["recommended"]]
    more = f"; {', '.join(alike)} cannot be told from it" if alike else ""
    but = f" (but: {' and '.join(chosen['flags'])})" if chosen["flags"] else ""
    return f"Recommended: {result['recommended']}{but}{more}"
