"""mteb's own loader of GritLM 7B reads an export, without code of the folder."""

import warnings

import numpy as np
import pytest

TEXTS = ["Land beside water.", "a", "word " * 20]


@pytest.mark.slow
def test_mteb_embeds_as_gritlm(exported_both):
    import datasets
    import mteb
    from mteb._create_dataloaders import create_dataloader
    from mteb.models.model_implementations.gritlm_models import gritlm7b
    from mteb.types import PromptType

    folder, model = exported_both
    options = {
        name: gritlm7b.loader_kwargs[name] for name in ("instruction_template", "include_prompt")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It uses old names of sentence-transformers.
        loaded = gritlm7b.loader(str(folder / "embedding"), None, device="cpu", **options)
    task = mteb.get_task("NFCorpus").metadata
    for kind in (PromptType.query, PromptType.document):
        texts = datasets.Dataset.from_dict({"text": TEXTS})
        batches = create_dataloader(texts, task_metadata=task, prompt_type=kind)
        names = {"task_metadata": task, "hf_split": "test", "hf_subset": "default"}
        theirs = loaded.encode(batches, prompt_type=kind, **names)
        prompt = loaded.get_task_instruction(task, kind)
        np.testing.assert_allclose(model.encode(TEXTS, instruction=prompt), theirs, atol=1e-5)
