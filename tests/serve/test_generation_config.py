"""What of a model's generation_config.json is applied with ``--generation-config model``."""

import pytest
from transformers import GenerationConfig

from prefixd.server.model.architecture import UnsupportedModel
from prefixd.server.serve.served_model import sampling_defaults
from prefixd.server.serve.settings import Settings


def test_only_stated_sampling_is_applied_and_only_on_request() -> None:
    config = GenerationConfig(temperature=0.6, top_k=20, max_new_tokens=9, do_sample=True)
    assert sampling_defaults(config, name="tiny") == {"temperature": 0.6, "top_k": 20}
    assert sampling_defaults(GenerationConfig(), name="tiny") == {}
    assert Settings.model_fields["generation_config"].default == "none"


def test_a_value_that_no_request_may_have_is_refused_by_name() -> None:
    config = GenerationConfig(temperature=5.0)
    with pytest.raises(UnsupportedModel, match=r"expected temperature .* got 5\.0"):
        sampling_defaults(config, name="tiny")
