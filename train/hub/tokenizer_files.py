"""A tokenizer as the files beside a Hugging Face model, so that serving engines can use it, chat requests included."""

import json
from pathlib import Path

from data.text.tokenizer import TOKENIZER_FILE, Tokenizer

TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
# Files of a tokenizer that may lie beside a model; text or JSON, all of them.
TOKENIZER_FILES = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
# Turns as lines of plain text: a pretrained model knows no tokens of its own for them.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def write_tokenizer(tokenizer: Tokenizer, directory: Path, max_length: int) -> None:
    """Writes tokenizer.json as it is, and the settings around it.

    Args:
        max_length: tokens of the longest text that the model takes.
    """
    tokenizer.save(directory / TOKENIZER_FILE)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "bos_token": None,
        "eos_token": tokenizer.eod_token,
        "pad_token": tokenizer.eod_token,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / TOKENIZER_CONFIG_FILE).write_text(text, encoding="utf-8")
