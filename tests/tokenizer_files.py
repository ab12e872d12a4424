"""Small tokenizers like those of Hugging Face's models, trained on real text."""

import json
from pathlib import Path

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = Path(__file__).parents[1] / "README.md"
# Training text of SentencePiece models.
LINES = ["<|user|> <|embed|> find the quick brown fox"] * 50
BEGIN, END, OTHER = "<|begin|>", "<|end|>", "<|other|>"
# Llama 3's pattern for words: up to three digits, and line breaks joined to what precedes them.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen's: the same, with single digits.
QWEN_2 = LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
BYTES = {"add_prefix_space": False, "use_regex": False}
SPLITS = {
    "gpt2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "llama3": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(**BYTES),
        ]
    ),
}
# Qwen's tokenizer also normalizes Unicode, so that not every text comes back as it was.
QWEN = "qwen"
# Tokenizers with SentencePiece's spaces: of converted Llama 2 models, and Gemma's, which does not
# begin a text with a space.
METASPACE, GEMMA = "metaspace", "gemma"
STYLES = (*SPLITS, QWEN, METASPACE, GEMMA)


def write_tokenizer(folder, style, size=700, begin=(BEGIN,), end=()):
    """Writes a tokenizer of `size` tokens and its configuration; returns the tokenizer's path.

    `begin` and `end` are the tokens that it adds to each text.
    """
    has_bytes_as_tokens = style in (METASPACE, GEMMA)
    if has_bytes_as_tokens:
        made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True))
        spaces = normalizers.Replace(" ", "\u2581")
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        if style == METASPACE:
            made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), spaces])
            steps.append(decoders.Strip(" ", 1, 0))
        else:
            made.normalizer = spaces
            made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        made.decoder = decoders.Sequence(steps)
        steps = []
        alphabet, special = [], [BEGIN, END, OTHER, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        made = tokenizers.Tokenizer(models.BPE())
        if style == QWEN:
            made.normalizer = normalizers.NFC()
            words = pre_tokenizers.Split(tokenizers.Regex(QWEN_2), "isolated")
            made.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(**BYTES)])
        else:
            made.pre_tokenizer = SPLITS[style]
        made.decoder = decoders.ByteLevel()
        # Like Llama 3 and GPT-2. It changes the character offsets that the package returns.
        steps = [processors.ByteLevel(trim_offsets=True)]
        alphabet, special = pre_tokenizers.ByteLevel.alphabet(), [BEGIN, END, OTHER]
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    made.train_from_iterator([TEXT.read_text(encoding="utf-8")], trainer)
    if has_bytes_as_tokens:  # Bytes are tokens like any other.
        content = json.loads(made.to_str())
        content["added_tokens"] = content["added_tokens"][:3]
        made = tokenizers.Tokenizer.from_str(json.dumps(content))
    if begin or end:
        ids = [(token, made.token_to_id(token)) for token in {*begin, *end}]
        single = [*begin, "$A", *end]
        steps.append(processors.TemplateProcessing(single=single, special_tokens=ids))
    made.post_processor = processors.Sequence(steps)
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": BEGIN, "eos_token": END, "add_bos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder / "tokenizer.json"


def write_sentencepiece(folder, vocab_size, lines=LINES, **options):
    """Writes a SentencePiece model of at most `vocab_size` pieces; returns its path."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "other"),
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        minloglevel=3,
        **options,
    )
    return folder / "other.model"


def write_llama_tokenizer(folder, vocab_size, **settings):
    """Writes a SentencePiece model with byte fallback, as Mistral's and Llama's."""
    lines = [*LINES, *TEXT.read_text(encoding="utf-8").splitlines()]
    options = {"model_type": "bpe", "byte_fallback": True, "split_digits": True}
    options |= {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    write_sentencepiece(folder, vocab_size, lines, **options).rename(folder / "tokenizer.model")
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "legacy": True, **special, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
