"""The page of fields and `grit-jax train --help` are up to date: docs/configuration_page.py"""

from pathlib import Path
import runpy

from flax.traverse_util import flatten_dict

from grit_jax.config import default_config

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"
script = runpy.run_path(str(PAGE.with_name("configuration_page.py")))


def test_the_page_is_up_to_date():
    assert script["with_tables"](PAGE.read_text()) == PAGE.read_text()
    assert script["HELP"].read_text() == script["train_help"]()


def test_every_field_is_described():
    fields = flatten_dict({"config": default_config().to_dict()}, sep=".", keep_empty_nodes=True)
    described = script["descriptions"]()
    assert {name for name, text in described.items() if len(text) > 10} >= fields.keys()
    for name in fields:
        assert f'<a id="{name}"></a>' in PAGE.read_text()
