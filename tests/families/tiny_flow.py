"""Tiny random flow-matching transformers: complete diffusers folders of further families."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tiny_models import BUILT, EOS, HIDDEN, write_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

Parts = dict[str, Any]  # by the folders that they go to
WIDTH = 16  # of the text encoders
LEVELS = 6  # of the VAEs, as in tests/tiny_models.py: 8 × 8 latents of 256 pixels

# --- tokenizers --------------------------------------------------------------------------------

# Krea 2 drops the first 34 tokens; a vocabulary learned from its words keeps that number.
SYSTEM = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, "
    "quantity, text, spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n"
)
TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{ '<think>\\n\\n</think>\\n\\n' }}
{%- endif -%}
{%- endif -%}
"""
MARKS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
MARKS += ["<|image_pad|>", "<|video_pad|>", "<think>", "</think>"]
SENTENCES = [SYSTEM, "assistant\n\n\n", "a photo of zkb dog, a painting of a cat"]


def write_qwen_tokenizer(folder: Path) -> int:
    """Write a tokenizer with Qwen's marks, rules and template; return its size."""
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learner.pre_tokenizer = pre_tokenizers.Sequence([split, letters])
    texts = [text for sentence in SENTENCES for text in re.split(r"<\|?/?\w+\|?>", sentence)]
    trainer = trainers.BpeTrainer(
        vocab_size=4000,
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    learner.train_from_iterator(texts * 2, trainer)
    learned = json.loads(learner.to_str())["model"]
    vocabulary = dict(learned["vocab"])
    vocabulary |= {mark: len(vocabulary) + number for number, mark in enumerate(MARKS)}
    merges = [
        tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in learned["merges"]
    ]
    rules: Any = {"vocab": vocabulary, "merges": merges}
    made = transformers.Qwen2Tokenizer(
        **rules, additional_special_tokens=MARKS[1:], model_max_length=131072
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return len(made)


def write_t5_tokenizer(folder: Path) -> int:
    """Write a tokenizer of letters in T5's layout; return its size."""
    letters = sorted(set("".join(SENTENCES)) - {" "})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0), ("▁", -2.0)]
    vocabulary += [(letter, -3.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    marks = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=512, **marks
    )
    made.save_pretrained(folder)
    config = folder / "tokenizer_config.json"
    said = json.loads(config.read_text("utf-8")) | {"tokenizer_class": "T5TokenizerFast"}
    config.write_text(json.dumps(said), "utf-8")
    return len(vocabulary) + 128  # the library adds marks of its own


# --- networks ----------------------------------------------------------------------------------


def _kl_vae() -> Any:
    """The VAE of FLUX.1 and Z-Image: its latents are moved as well as scaled."""
    return diffusers.AutoencoderKL(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16, 16, 16)[:LEVELS],
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * LEVELS,
        up_block_types=("UpDecoderBlock2D",) * LEVELS,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        force_upcast=True,
    )


def _flux2_vae() -> Any:
    """The VAE of FLUX.2, whose latents are normalised by what it remembers of them."""
    vae: Any = diffusers.AutoencoderKLFlux2(
        sample_size=64,
        block_out_channels=(8, 8, 16, 16, 16)[: LEVELS - 1],  # the denoiser halves once more
        down_block_types=("DownEncoderBlock2D",) * (LEVELS - 1),
        up_block_types=("UpDecoderBlock2D",) * (LEVELS - 1),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
    )
    vae.bn.running_mean.normal_(0, 0.1)  # not 0 and 1, which would hide a mistake
    vae.bn.running_var.uniform_(0.5, 2)
    return vae


def _qwen_vae() -> Any:
    """The VAE of Qwen-Image, made for films: its latents have a time."""
    return diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=16,
        dim_mult=[1, 2, 2, 2, 2, 2][:LEVELS],
        num_res_blocks=1,
        temperal_downsample=[False] * (LEVELS - 3) + [True, True],
    )


def _qwen3(vocabulary: int, layers: int) -> Any:
    """A Qwen3 of a few layers."""
    config = transformers.Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        vocab_size=vocabulary,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return transformers.Qwen3ForCausalLM(config)


def _qwen3_vl(vocabulary: int) -> Any:
    """A Qwen3-VL of nine layers, of which three are read, and the smallest eye."""
    text = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": 9,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "vocab_size": vocabulary,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        },
    }
    eye: dict[str, Any] = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2}
    eye |= {"out_hidden_size": WIDTH, "deepstack_visual_indexes": [0]}
    return transformers.Qwen3VLModel(
        transformers.Qwen3VLConfig(text_config=text, vision_config=eye)
    )


def _clip() -> Any:
    """A CLIP text encoder as FLUX.1 has it."""
    config = transformers.CLIPTextConfig(
        vocab_size=600,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        projection_dim=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        eos_token_id=2,
    )
    return transformers.CLIPTextModel(config)


# --- families ----------------------------------------------------------------------------------

Flow = diffusers.FlowMatchEulerDiscreteScheduler


def _z_image(folder: Path) -> Parts:
    """Z-Image."""
    vocabulary = write_qwen_tokenizer(folder / "tokenizer")
    transformer = diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        in_channels=16,
        axes_dims=[8, 4, 4],
        axes_lens=[1024, 64, 64],
        rope_theta=256.0,
    )
    text = _qwen3(vocabulary, 3)
    return {"transformer": transformer, "vae": _kl_vae(), "text_encoder": text} | {
        "scheduler": Flow(shift=6.0)
    }


def _flux2_klein(folder: Path) -> Parts:
    """FLUX.2 klein, which reads layers 9, 18 and 27 of its text encoder."""
    vocabulary = write_qwen_tokenizer(folder / "tokenizer")
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,  # four channels of 2 × 2 latents
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * WIDTH,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    text = _qwen3(vocabulary, 36)
    return {"transformer": transformer, "vae": _flux2_vae(), "text_encoder": text} | {
        "scheduler": Flow(shift=3.0, use_dynamic_shifting=True)
    }


def _krea2(folder: Path) -> Parts:
    """Krea 2."""
    vocabulary = write_qwen_tokenizer(folder / "tokenizer")
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        timestep_embed_dim=16,
        text_hidden_dim=WIDTH,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=2,
        text_intermediate_size=32,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    schedule = Flow(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=6400,
    )
    text = _qwen3_vl(vocabulary)
    return {"transformer": transformer, "vae": _qwen_vae(), "text_encoder": text} | {
        "scheduler": schedule
    }


def _flux1(folder: Path) -> Parts:
    """FLUX.1 dev, which is told a guidance; its second text encoder is a T5."""
    write_tokenizer(folder / "tokenizer", EOS)
    vocabulary = write_t5_tokenizer(folder / "tokenizer_2")
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=HIDDEN,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    t5 = transformers.T5Config(
        vocab_size=vocabulary,
        d_model=24,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=3,
        feed_forward_proj="gated-gelu",
    )
    texts = {"text_encoder": _clip(), "text_encoder_2": transformers.T5EncoderModel(t5)}
    return {"transformer": transformer, "vae": _kl_vae(), **texts} | {
        "scheduler": Flow(shift=3.0, use_dynamic_shifting=True)
    }


FLOW_FAMILIES: dict[str, tuple[Callable[[Path], Parts], dict[str, Any]]] = {
    "z_image": (_z_image, {"_class_name": "ZImagePipeline"}),
    "flux2_klein": (_flux2_klein, {"_class_name": "Flux2KleinPipeline", "is_distilled": False}),
    "flux1": (_flux1, {"_class_name": "FluxPipeline"}),
    "krea2": (
        _krea2,
        {
            "_class_name": "Krea2Pipeline",
            "text_encoder_select_layers": [2, 5, 8],
            "is_distilled": False,
            "patch_size": 2,
        },
    ),
}
TOKENIZERS = {"flux1": ("CLIPTokenizer", "T5TokenizerFast")}


def build_flow(family: str, folder: Path) -> Path:
    """Write a complete diffusers folder of tiny random networks; the same bytes every time."""
    return Path(shutil.copytree(_build_once(family), folder, dirs_exist_ok=True))


@functools.cache
def _build_once(family: str) -> Path:
    """Build a folder to copy from."""
    folder = Path(BUILT.name, family)
    build, index = FLOW_FAMILIES[family]
    index = index | {"_diffusers_version": "0.42.1"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        for name, part in build(folder).items():
            part.save_pretrained(folder / name)
            library = "transformers" if name.startswith("text") else "diffusers"
            index[name] = [library, type(part).__name__]
    for number, kind in enumerate(TOKENIZERS.get(family, ("Qwen2Tokenizer",)), start=1):
        index["tokenizer" if number == 1 else f"tokenizer_{number}"] = ["transformers", kind]
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), "utf-8")
    return folder
