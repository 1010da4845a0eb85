"""Tiny models of the real classes that describe pictures, for tests without a network."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BartTokenizer,
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
    CLIPImageProcessorPil,
    Florence2Config,
    Florence2ForConditionalGeneration,
    Florence2Processor,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>"]
CHAT = (
    "{% for message in messages %}{{ message['role'] }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def signs() -> list[str]:
    """List the signs of printable ASCII as byte-level vocabularies have them; so all is text."""
    return [*map(chr, range(33, 127)), "\u0120", "\u010a"]  # the last: blank and new line


def save(model: Any, processor: Any, folder: Path) -> Path:
    """Save a model that says what it sees first: weights as small as usual hardly see at all."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.4)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_florence(folder: Path) -> Path:
    """Make a Florence-2 that has learned nothing."""
    torch.manual_seed(0)
    words = [*SPECIAL, *signs()]
    vocabulary = {word: number for number, word in enumerate(words)}
    more = {"image_token": "<image>"}
    tokenizer = BartTokenizer(vocab=vocabulary, merges=[], extra_special_tokens=more)
    images: Any = CLIPImageProcessorPil(size={"height": 64, "width": 64}, do_center_crop=False)
    images.image_seq_length = 5  # two by two, and their mean
    rules: dict[str, Any] = {"pure_text": {}, "description_with_bboxes": OBJECTS}
    processor = Florence2Processor(
        images, tokenizer, num_additional_image_tokens=1, post_processor_config=rules
    )
    levels: dict[str, Any] = dict.fromkeys(("num_heads", "num_groups"), (2, 2, 2, 2))
    levels |= {"embed_dim": (8, 16, 16, 16), "depths": (1, 1, 1, 1)}
    layers: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sizes = {"layers": 1, "attention_heads": 2, "ffn_dim": 32}
        layers |= {f"{side}_{name}": size for name, size in sizes.items()}
    text = {"model_type": "bart", "d_model": 32, "vocab_size": len(tokenizer), **layers}
    ids: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    config = Florence2Config(
        vision_config={**levels, "window_size": 2, "projection_dim": 32},
        text_config=text | {"max_position_embeddings": 320},
        **ids | {"image_token_id": tokenizer.convert_tokens_to_ids("<image>")},
    )
    return save(Florence2ForConditionalGeneration(config), processor, folder)


# How the published checkpoints say what is to be read out of `car<loc_1><loc_2><loc_3><loc_4>`.
OBJECTS = {
    "pattern": r"([a-zA-Z0-9 ]+)<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>",
    "quantizer_mode": "floor",
    "quantizer_bins": [1000, 1000],
}


def make_blip(folder: Path) -> Path:
    """Make a BLIP that has learned nothing."""
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words += ["a", "photo", "of", "red", "green", "blue", "dog", "cat", "sits", "in", "snow"]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)})
    images = BlipImageProcessorPil(size={"height": 32, "width": 32})
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 16}
    # The published one begins with a token that its tokenizer does not know, and so never says.
    ids = {"bos_token_id": len(words), "sep_token_id": 3, "pad_token_id": 0, "eos_token_id": 3}
    text = sizes | ids | {"vocab_size": len(words) + 1, "encoder_hidden_size": 32}
    seen = sizes | {"image_size": 32, "patch_size": 16}
    config = BlipConfig(text_config=text, vision_config=seen)
    return save(BlipForConditionalGeneration(config), BlipProcessor(images, tokenizer), folder)


def make_llava(folder: Path) -> Path:
    """Make a LLaVA that has learned nothing: what JoyCaption is, in small."""
    torch.manual_seed(0)
    words = [*SPECIAL, "<image>", *signs()]
    known = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, []))
    known.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    known.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    more = {"image_token": "<image>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=known, extra_special_tokens=more, **names)
    images = SiglipImageProcessorPil(size={"height": 32, "width": 32})
    options: dict[str, Any] = {"patch_size": 16, "vision_feature_select_strategy": "full"}
    processor = LlavaProcessor(images, tokenizer, chat_template=CHAT, **options)
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2}
    seen = SiglipVisionConfig(**sizes, image_size=32, patch_size=16)
    ids: dict[str, Any] = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    text = LlamaConfig(**sizes, **ids, vocab_size=len(words), num_key_value_heads=2)
    config = LlavaConfig(
        vision_config=seen,
        text_config=text,
        image_token_index=words.index("<image>"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return save(LlavaForConditionalGeneration(config), processor, folder)


TAGS = [  # name, category; what is drawn below makes the first of each colour likely
    ("general", 9),
    ("sensitive", 9),
    ("red_theme", 0),
    ("blue_theme", 0),
    ("^_^", 0),
    ("long_hair", 0),
    ("zkb_(imp)", 4),
    ("hatsune_miku", 4),
]


def make_tagger(folder: Path, side: int = 16) -> Path:
    """Make a tagger of one layer, that knows red from blue and always says some tags."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    weights = np.zeros((3, len(TAGS)), np.float32)  # rows: blue, green, red
    weights[2, 2], weights[0, 2] = 0.02, -0.02
    weights[2, 3], weights[0, 3] = -0.02, 0.02
    # Probabilities of .9, .1, twice by the colour, then .6, .3, .9 and .8.
    bias = np.array([2.2, -2.2, 0, 0, 0.4, -0.85, 2.2, 1.4], np.float32)
    constants = [
        numpy_helper.from_array(np.array([1, 2]), "places"),
        numpy_helper.from_array(weights, "weights"),
        numpy_helper.from_array(bias, "bias"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["input", "places"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "weights", "bias"], ["sum"]),
        helper.make_node("Sigmoid", ["sum"], ["output"]),
    ]
    given = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", side, side, 3])
    told = helper.make_tensor_value_info("output", TensorProto.FLOAT, ["n", len(TAGS)])
    graph = helper.make_graph(nodes, "tagger", [given], [told], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(made, folder / "model.onnx")
    with (folder / "selected_tags.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["tag_id", "name", "category", "count"])
        writer.writerows([number, *tag, 1] for number, tag in enumerate(TAGS))
    return folder
