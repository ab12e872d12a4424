"""A run in the base's chat template and with `Instruct:` prompts: data, training, use, export."""

import json
import os
import shutil

os.environ["HF_HUB_OFFLINE"] = "1"

from command_line import ROOT, grit_jax_in_process
from etils import epath
import pytest
import reference_values
from small_model import one_device
from tokenizer_files import BEGIN, END, write_tokenizer

from grit_jax import GritLM
from grit_jax.config_flags import parse_flags
from grit_jax.config_from_data import complete_config
from grit_jax.conversion import open_model
from grit_jax.conversion.export import write_hugging_face
from grit_jax.data.manifest import PreparedDataError, PreparedDataset
from grit_jax.from_config import make_batches, make_trainer
from grit_jax.inference.prompt_encoder import PromptEncoder
from grit_jax.run import run

TEMPLATE = f"""\
{{% for m in messages %}}{{{{ '{BEGIN}' + m.role + '\\n' + m.content + '{END}' }}}}{{% endfor %}}\
{{% if add_generation_prompt %}}{{{{ '{BEGIN}assistant\\n' }}}}{{% endif %}}"""
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]
SYSTEM = {"role": "system", "content": "Be kind."}
EMBEDDING = ["--embedding-template", r"Instruct: {instruction}\nQuery: {text}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small base model with a chat template, and lines of both kinds."""
    folder = tmp_path_factory.mktemp("template")
    shutil.copytree(reference_values.FOLDER / "tiny-mistral", folder / "model")
    write_tokenizer(folder / "model", "smollm", size=300, begin=())
    (folder / "model" / "chat_template.jinja").write_text(TEMPLATE)
    lines = {
        "questions": [{"query": ["Find:", f"q{n}"], "pos": [f"a{n}"]} for n in range(32)],
        "chats": [{"messages": [SYSTEM, *CHAT]}] * 8,
    }
    (folder / "mine").mkdir()
    for name, objects in lines.items():
        (folder / "mine" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, objects)))
    return folder


def prepare(folder, *argv):
    options = ("--output", "data", "--tokenizer", folder / "model", "--processes", 1)
    return grit_jax_in_process("prepare", "mine", *options, *argv, cwd=folder)


def parse(folder, *argv):
    flags = [f"--config={ROOT}/configs/finetune.py", f"--config.data.folder={folder}/data"]
    flags += [f"--config.model.weights={folder}/model", "--config.model.dtype=float32"]
    return complete_config(parse_flags([*flags, *argv])[0])


@pytest.mark.slow
def test_data_training_inference_and_export_have_the_template_of_the_base(folder, capsys):
    finished = prepare(folder, "--template", "base", *EMBEDDING)
    assert finished.returncode == 0, finished.stderr
    chat = PreparedDataset(folder / "data", "mine.chats", "train").read([0])[0].chat
    base = GritLM.from_pretrained(folder / "model", dtype="float32", mesh=one_device())
    shown = "".join(f"{BEGIN}{m['role']}\n{m['content']}{END}" for m in (SYSTEM, *CHAT))
    assert chat.tokens.tolist() == base.tokenizer.encode_markup(shown)
    assert chat.tokens[chat.mask].tolist() == base.tokenizer.encode_markup(f"hi{END}")
    # Prepared again only if the template has changed.
    assert "up to date" in prepare(folder, "--template", "base", *EMBEDDING).stdout

    config = parse(folder, "--config.data.template=grit")
    trainer = make_trainer(config, open_model(folder / "model"))
    with pytest.raises(PreparedDataError, match=r"config\.data\.template='grit', but .*base: prep"):
        make_batches(config, trainer)
    run(parse(folder, "--config.data.template=base"), epath.Path(folder / "run"))
    assert "queries are embedded with 'Find:'; documents without" in capsys.readouterr().out
    write_hugging_face(open_model(folder / "run"), folder / "exported")
    # The template is the model's, whatever tokenizer is named.
    named = {"tokenizer": folder / "model" / "tokenizer.json"}
    for path, options in (("run", {}), ("exported", {}), ("run", named)):
        model = GritLM.from_pretrained(folder / path, mesh=one_device(), **options)
        assert model.tokenizer.chat_template == TEMPLATE
        spec = model.embedding_spec
        assert (spec.query_prompt, spec.document_prompt) == ("Instruct: Find:\nQuery: ", "")
        assert spec.prompt("Look for it") == "Instruct: Look for it\nQuery: "
        with pytest.raises(ValueError, match=r"has the marker Instruct: .*which is added for you"):
            model.encode_query("a", instruction=spec.query_prompt)
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder / "exported")
    expected = theirs.apply_chat_template([SYSTEM, CHAT[0]], add_generation_prompt=True)
    encoder = PromptEncoder(model.tokenizer, model.model.config.vocab_size)
    prompt = encoder.encode_chat([SYSTEM, CHAT[0]], is_continuation=False, name="chat")
    assert prompt.tolist() == expected["input_ids"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--template", "base", "--tokenizer", "mistral"], "has no chat template of its own"),
        (["--template", "base", "--chat-labels", "original"], "needs --template grit"),
        (["--embedding-template", "query: {text}"], "must be 'grit', 'instruct' or a format"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_one_line(folder, argv, message):
    finished = prepare(folder, *argv)
    assert message in finished.stderr and finished.returncode
    assert "Traceback" not in finished.stderr
