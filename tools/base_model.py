"""A base model as the trainer finds it and loads it, for programs that draw with or compare it."""

from __future__ import annotations

from typing import Any

import train_lora
from tools.program import refuse
from train_lora import BaseModel, Emitter, ModelFacts, Record, TrainError, TrainingConfig


def ask_for(base_model: str, **knobs: Any) -> TrainingConfig:
    """Say which model is meant, and what of it is wanted, as the trainer is asked for it."""
    nowhere: Record = {"dataset_path": ".no dataset", "output_path": ".no output"}
    asked = {"base_model": base_model, "trigger_words": ["none"], "resume": "never", **nowhere}
    return TrainingConfig.from_record(asked | {k: v for k, v in knobs.items() if v is not None})


def find_model(config: TrainingConfig, events: Emitter) -> tuple[ModelFacts, BaseModel]:
    """Find a model on this machine, or fetch it; an error names the model and no knob."""
    try:
        facts, base = train_lora.inspect_model(config)
        return (facts, base) if base else train_lora.download_model(config, events)
    except TrainError as error:
        problem = error.problems[0]
        if problem.path != "base_model":
            raise
        found, hint = problem.found, problem.hint
        raise refuse(config.base_model, problem.expected, found, hint) from error


def title_of(config: TrainingConfig) -> str:
    """Name a model as it may be passed on: never where it lies on somebody's disk."""
    place = train_lora.expand_home(config.base_model)
    return place.name if place.exists() else config.base_model
