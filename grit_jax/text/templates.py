"""The text formats of GRIT (arXiv 2402.09906, figure 3).

The markers are ordinary text to the tokenizer; only `<s>` and `</s>` are tokens of their own, and
the functions of `examples` put them in as ids: those with which the tokenizer begins and ends a
text, whatever it calls them.
"""

USER = "<|user|>\n"
EMBED = "<|embed|>\n"
ASSISTANT = "<|assistant|>\n"


def embedding_prefix(instruction: str) -> str:
    """Returns what stands before a text to be embedded, `<s>` left out."""
    instruction = instruction.strip("\t\n :")
    return f"{USER}{instruction}\n{EMBED}" if instruction else EMBED


def chat_prompt(user: str, *, is_first: bool) -> str:
    """Returns a user's turn and the marker after which the assistant speaks, `<s>` left out."""
    return f"{'' if is_first else chr(10)}{USER}{user}\n{ASSISTANT}"
