"""Chat models by reference, and behind an endpoint."""

from eaftdrope.evaluate.rlm import chat_models
from eaftdrope.rlm.models import HFModel
from tests.tiny_models import save_model


def test_models_by_reference(tmp_path):
    folder = save_model(tmp_path / "model")
    root, sub_model = chat_models.open_models(str(folder), None)
    assert isinstance(root, HFModel) and root is sub_model and root.name.startswith(f"{folder}@")
    assert root.window == 512 and not root.model.training
    other = save_model(tmp_path / "other", tied=False)
    assert chat_models.open_chat_model(str(other)).name.split("@")[1] != root.name.split("@")[1]


def test_models_at_an_endpoint(monkeypatch):
    opened = []
    monkeypatch.setattr(chat_models, "ServedModel", lambda *given, **options: opened.append((given, options)) or given)
    monkeypatch.setenv("EAFTDROPE_API_KEY", "abc")
    url, options = "http://localhost:1/v1", {"window": 100, "api_key": "abc", "timeout": 7}
    assert chat_models.open_models("big", "small", endpoint=url, window=100, timeout=7) == (
        (url, "big"),
        (url, "small"),
    )
    assert opened == [((url, "big"), options), ((url, "small"), options)]
    root, sub_model = chat_models.open_models("big", None, endpoint=url)
    assert root is sub_model
