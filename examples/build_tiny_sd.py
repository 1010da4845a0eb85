"""Train the bundled model: a Stable Diffusion 1.x pipeline of five million parameters.

    python examples/build_tiny_sd.py [FOLDER]      writes examples/tiny-sd in an hour on two cores

It learns pictures of coloured shapes (`shapes.py`) from nothing, in parts: the VAE, then the
latents of all pictures, the text encoder, and the denoiser. Everything follows from SEED, so that
the same machine makes the same files.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

import measure
from shapes import (
    PALETTE,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    Scene,
    draw_clutter,
    draw_scene,
    invent_scene,
    unseen,
)

if TYPE_CHECKING:
    from PIL import Image

SEED = 20
TOKENS = 16  # of a caption, both ends included; a fifth of CLIP's 77, and so much faster
WIDTH = 128  # of the text encoder
WORDS = [*PALETTE, *SHAPES, *" ".join([*SIZES, *PLACES]).split(), "a", "an", "and", "with"]
WORDS += ["background"]

# Pieces of pictures are cheap; the last steps see whole ones, whose averages differ.
VAE_STEPS, VAE_BATCH, VAE_CROP = 6000, 6, 64
WHOLE_STEPS, WHOLE_BATCH = 400, 2
SPREAD = 0.1  # of a latent around its mean
PICTURES = 8000
TEXT_STEPS, TEXT_BATCH = 1500, 64
STEPS, BATCH, PEAK_RATE = 5000, 16, 1.5e-3
# What the words say is decided where there is hardly anything but noise: half of all time steps are
# drawn from there.
NOISE_ALONE, LAST_TIME = 600, 1000
UNPROMPTED = 0.1  # share of captions left out, for guidance
MEMORY = 0.999  # of the moving average of the weights, which is what is kept


@dataclass
class Recipe:
    """What happened during the build, for the model card."""

    minutes: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)

    def loss(self, part: str) -> str:
        """Write the loss of a part, where it has one."""
        return f"{self.losses[part]:.4f}" if part in self.losses else ""


def say(words: str) -> None:
    """Show progress."""
    sys.stderr.write(f"{words}\n")


def device() -> torch.device:
    """Take a graphics card where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


# --- words ---------------------------------------------------------------------------------------


def learn_merges(words: list[str]) -> list[tuple[str, str]]:
    """Join letters until every word is one token, the most frequent pair first."""
    spelled = [[*word[:-1], f"{word[-1]}</w>"] for word in words]
    merges = []
    while any(len(parts) > 1 for parts in spelled):
        pairs = Counter(pair for parts in spelled for pair in itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [join(parts, best) for parts in spelled]
    return merges


def join(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """Replace a pair by one token wherever it stands."""
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def write_tokenizer(folder: Path) -> Any:
    """Write a CLIP tokenizer that knows each word of the captions, and any other by its bytes."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(code) for code in (*shown, *range(256, 512 - len(shown)))]
    merges = learn_merges(sorted(set(WORDS)))
    ends = ["<|startoftext|>", "<|endoftext|>"]
    tokens = [*symbols, *(f"{s}</w>" for s in symbols), *(a + b for a, b in merges), *ends]
    special = {"bos_token": ends[0], "eos_token": ends[1], "unk_token": ends[1]}
    special |= {"pad_token": ends[1]}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True}
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", special | config)
    return CLIPTokenizer.from_pretrained(folder)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON."""
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")


# --- networks ------------------------------------------------------------------------------------


def new_vae() -> Any:
    """Make the VAE: 256 pixels become 32 x 32 latents, as in every Stable Diffusion 1.x."""
    torch.manual_seed(SEED)
    return AutoencoderKL(
        sample_size=SIDE,
        block_out_channels=(8, 16, 32, 64),
        norm_num_groups=1,  # small groups would normalise the colours away
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
    )


def new_unet() -> Any:
    """Make the denoiser: four levels as in Stable Diffusion 1.x, attention in the lower three."""
    torch.manual_seed(SEED + 1)
    unet: Any = UNet2DConditionModel(
        sample_size=SIDE // 8,
        block_out_channels=(32, 48, 96, 96),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3 + ("UpBlock2D",),
        attention_head_dim=2,
        cross_attention_dim=WIDTH,
    )
    return unet.to(memory_format=torch.channels_last)


def new_text_encoder(tokenizer: Any) -> Any:
    """Make the text encoder, two layers deep."""
    torch.manual_seed(SEED + 2)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_schedule() -> Any:
    """Make the noise schedule.

    It ends in noise alone, unlike Stable Diffusion's, and the velocity is predicted: a picture's
    large plain areas otherwise shine through, and colours would not be learned from the words.
    """
    return DDIMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="v_prediction",
        set_alpha_to_one=False,
        steps_offset=1,
        clip_sample=False,
    )


# --- training ------------------------------------------------------------------------------------


def train(
    name: str,
    networks: list[Any],
    steps: int,
    rate: float,
    loss_of_step: Callable[[int], torch.Tensor],
    recipe: Recipe,
) -> None:
    """Train networks and leave the moving average of their weights in them."""
    parameters = [weight for network in networks for weight in network.parameters()]
    average = [weight.detach().clone() for weight in parameters]
    optimizer = torch.optim.AdamW(parameters, rate, (0.9, 0.99), weight_decay=0.01, fused=True)
    peak, losses, begun = min(200, steps // 5), [], time.monotonic()
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps, pct_start=peak / steps, cycle_momentum=False
    )
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        loss = loss_of_step(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        memory = min(MEMORY, step / (step + 10))
        torch._foreach_lerp_(average, [weight.detach() for weight in parameters], 1 - memory)
        losses.append(loss.item())
        if step % 100 == 0:
            minutes = (time.monotonic() - begun) / 60
            mean = np.mean(losses[-100:])
            say(f"{name}: step {step} of {steps}, loss {mean:.4f}, {minutes:.1f} min")
    with torch.no_grad():
        for weight, kept in zip(parameters, average, strict=True):
            weight.copy_(kept)
    recipe.minutes[name] = (time.monotonic() - begun) / 60
    recipe.losses[name] = float(np.mean(losses[-200:]))


def pixels(pictures: list[Image.Image]) -> torch.Tensor:
    """Turn pictures into numbers from -1 to 1, [pictures, 3, height, width]."""
    values = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    return values.permute(0, 3, 1, 2).to(device()).float() / 127.5 - 1


def train_vae(vae: Any, recipe: Recipe) -> None:
    """Teach the VAE to keep a picture in an eighth of its width and height."""
    chance = random.Random(SEED)

    def picture() -> Image.Image:
        return draw_clutter(chance) if chance.random() < 0.5 else draw_scene(invent_scene(chance))

    def piece() -> Image.Image:
        x, y = (chance.randrange(SIDE - VAE_CROP + 1) for _ in "xy")
        return picture().crop((x, y, x + VAE_CROP, y + VAE_CROP))

    def loss(images: torch.Tensor) -> torch.Tensor:
        code = vae.encode(images).latent_dist
        error = vae.decode(code.mean + SPREAD * torch.randn_like(code.mean)).sample - images
        spread = (code.logvar - 2 * math.log(SPREAD)).square().mean()
        # Three of the four latents start from the colours, which are slow to be found otherwise.
        thumbnail = functional.mse_loss(code.mean[:, :3], 1.5 * functional.avg_pool2d(images, 8))
        size = code.mean.square().mean()
        wrong = error.abs().mean() + error.square().mean()
        total: torch.Tensor = wrong + 0.01 * spread + thumbnail + 1e-3 * size
        return total

    def loss_of_step(step: int) -> torch.Tensor:
        if step > VAE_STEPS - WHOLE_STEPS:
            return loss(pixels([picture() for _ in range(WHOLE_BATCH)]))
        return loss(pixels([piece() for _ in range(VAE_BATCH)]))

    for block in vae.modules():
        if isinstance(block, ResnetBlock2D):  # begin as if it were not there
            torch.nn.init.zeros_(block.conv2.weight)
    train("vae", [vae], VAE_STEPS, 2e-3, loss_of_step, recipe)
    # From here on a latent is its mean: the denoiser learns from means alone, and would take
    # what a sample adds for noise.
    with torch.no_grad():
        vae.quant_conv.weight[4:] = 0
        vae.quant_conv.bias[4:] = -20
    vae.eval().requires_grad_(False)


def single_scenes(chance: random.Random) -> Iterator[Scene]:
    """Think up pictures of one thing; two at once would take a small model much longer."""
    while True:
        scene = invent_scene(chance)
        if len(scene.things) == 1:
            yield scene


def encode_pictures(vae: Any, tokenizer: Any, recipe: Recipe) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw all pictures once and keep their latents and captions; also set the latents' scale."""
    chance, begun = random.Random(SEED + 1), time.monotonic()
    scenes = list(itertools.islice(single_scenes(chance), PICTURES))
    latents = []
    with torch.no_grad():
        for first in range(0, len(scenes), 20):
            images = pixels([draw_scene(scene) for scene in scenes[first : first + 20]])
            latents.append(vae.encode(images).latent_dist.mean)
            if first % 1000 == 0:
                say(f"latents: {first} of {len(scenes)}")
    kept = torch.cat(latents)
    vae.register_to_config(scaling_factor=round(1 / float(kept.std()), 5))
    recipe.minutes["latents"] = (time.monotonic() - begun) / 60
    return kept * vae.config.scaling_factor, tokenize(tokenizer, [s.caption for s in scenes])


def tokenize(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Turn captions into token numbers, [captions, TOKENS]."""
    filled = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
    numbers: torch.Tensor = filled.input_ids.to(device())
    return numbers


def shuffled(count: int, size: int) -> Iterator[torch.Tensor]:
    """Give the numbers of one batch after another; every picture comes once before any twice."""
    while True:
        yield from torch.randperm(count).split(size)[: count // size]


def said_by(scene: Scene) -> list[str | None]:
    """Tell what a caption says: colour, shape, size, place and background; None where it does not.

    A size or a place that is not named is one too.
    """
    front = scene.caption.rpartition(" on ")[0]
    words, thing = front.split(), scene.things[0]
    return [
        thing.colour if thing.colour in words else None,
        thing.shape if thing.shape in words else None,
        next((size for size in SIZES if size in words), ""),
        next((place for place in PLACES if place and place in front), ""),
        scene.background,
    ]


def train_text_encoder(text_encoder: Any, tokenizer: Any, recipe: Recipe) -> None:
    """Teach the text encoder what captions say: every token at their end is to know all of it.

    Stable Diffusion's was trained beforehand too. One that learns with the denoiser alone takes
    longer than all the rest.
    """
    scenes = single_scenes(random.Random(SEED + 2))
    answers = [list(PALETTE), list(SHAPES), list(SIZES), list(PLACES), list(PALETTE)]
    heads = torch.nn.Linear(WIDTH, sum(map(len, answers))).to(device())

    def loss(_step: int) -> torch.Tensor:
        batch = list(itertools.islice(scenes, TEXT_BATCH))
        words = tokenize(tokenizer, [scene.caption for scene in batch])
        told = heads(text_encoder(words).last_hidden_state)  # [scenes, tokens, all answers]
        ends = words == tokenizer.eos_token_id
        total = torch.zeros((), device=device())
        for part, names, right in zip(
            told.split([len(names) for names in answers], dim=-1),
            answers,
            zip(*map(said_by, batch), strict=True),
            strict=True,
        ):
            numbers = [names.index(name) if name in names else -100 for name in right]
            wanted = torch.tensor(numbers, device=device())[:, None].expand_as(words)
            total = total + functional.cross_entropy(part[ends], wanted[ends])
        return total

    train("text", [text_encoder, heads], TEXT_STEPS, 1e-3, loss, recipe)
    text_encoder.eval().requires_grad_(False)


def draw_times() -> torch.Tensor:
    """Draw a time step for each picture of a batch."""
    anywhere = torch.randint(LAST_TIME, (BATCH,))
    late = torch.randint(NOISE_ALONE, LAST_TIME, (BATCH,))
    return torch.where(torch.rand(BATCH) < 0.5, anywhere, late).to(device())


def train_denoiser(
    unet: Any,
    text_encoder: Any,
    latents: torch.Tensor,
    captions: torch.Tensor,
    empty: torch.Tensor,
    recipe: Recipe,
) -> None:
    """Teach the denoiser to tell the noise in a latent from its picture."""
    torch.manual_seed(SEED + 3)
    schedule, batches = new_schedule(), shuffled(len(latents), BATCH)

    def loss(_step: int) -> torch.Tensor:
        chosen = next(batches)
        clean, words = latents[chosen], captions[chosen]
        silent = torch.rand(BATCH, device=device()) < UNPROMPTED
        words = torch.where(silent[:, None], empty, words)
        noise, times = torch.randn_like(clean), draw_times()
        noisy = schedule.add_noise(clean, noise, times)
        answer = unet(noisy, times, text_encoder(words).last_hidden_state).sample
        return functional.mse_loss(answer, schedule.get_velocity(clean, noise, times))

    train("denoiser", [unet], STEPS, PEAK_RATE, loss, recipe)


# --- the folder ----------------------------------------------------------------------------------


def build(folder: Path) -> None:
    """Train everything and write the pipeline with its card."""
    torch.set_num_threads(2)
    recipe = Recipe()
    tokenizer = write_tokenizer(folder / "tokenizer")
    vae = new_vae().to(device())
    train_vae(vae, recipe)
    latents, captions = encode_pictures(vae, tokenizer, recipe)
    text_encoder = new_text_encoder(tokenizer).to(device())
    train_text_encoder(text_encoder, tokenizer, recipe)
    unet = new_unet().to(device())
    train_denoiser(unet, text_encoder, latents, captions, tokenize(tokenizer, [""]), recipe)
    write_pipeline(folder, vae, unet, text_encoder, tokenizer)
    write_card(folder, recipe)


def write_pipeline(folder: Path, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Write everything in half precision."""
    pipeline: Any = StableDiffusionPipeline(
        vae=vae.half(),
        text_encoder=text_encoder.half(),
        tokenizer=tokenizer,
        unet=unet.half(),
        scheduler=new_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)


CARD = """# tiny-sd

A Stable Diffusion 1.x pipeline of {parameters:.1f} million parameters. It draws coloured shapes,
256 x 256 pixels. `examples/build_tiny_sd.py` trained it from nothing on pictures that
`examples/shapes.py` draws; it is there to try `train_lora.py` on a CPU, without a network.

![What it draws for combinations that no training picture showed](grid.png)

It knows the shapes {shapes} and the colours
{colours}; small, large, and of a size between where
neither is named; on the left, on the right, at the top, at the bottom, and in the middle where no
place is named: "a large red circle on the left on a blue background". It reads {tokens} tokens. A
word it does not know stands for any shape. It predicts the velocity, and its noise schedule ends in
pure noise.

| part | minutes | last loss |
| --- | --- | --- |
{rows}

Made with {processor} from {pictures} pictures. {combinations} combinations of colour, shape and
background were left out. Of {count} pictures of those, drawn with guidance {guidance:g}, a program
(`examples/measure.py`) finds right: {score}.

Half precision on disk; the licence is the repository's.
"""


def write_card(folder: Path, recipe: Recipe) -> None:
    """Judge the finished model, and write down how it was made and what it can do."""
    pipeline = measure.load(folder)
    score, pictures = measure.judge_base(pipeline, rounds=2)
    measure.tile(pictures[::2][:24], columns=8, side=96).save(folder / "grid.png")
    networks = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    rows = [
        f"| {part} | {time:.0f} | {recipe.loss(part)} |" for part, time in recipe.minutes.items()
    ]
    card = CARD.format(
        parameters=sum(w.numel() for network in networks for w in network.parameters()) / 1e6,
        shapes=", ".join(SHAPES),
        colours=", ".join(PALETTE),
        tokens=TOKENS,
        rows="\n".join(rows),
        pictures=f"{PICTURES:,}",
        processor="a graphics card" if device().type == "cuda" else "two CPU cores",
        combinations=len(unseen()),
        count=len(pictures),
        guidance=measure.GUIDANCE,
        score=score,
    )
    (folder / "README.md").write_text(card, "utf-8")
    say(str(score))


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else measure.BASE)
