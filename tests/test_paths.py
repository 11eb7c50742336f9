"""URLs hold no secrets: they are refused, and cut out of messages, without being said."""

from __future__ import annotations

from pathlib import Path

import pytest

from lzn_dist.config import ConfigError, load_config
from lzn_dist.paths import expand_path, without_secrets

DIGITS = Path(__file__).parents[1] / "configs" / "digits_joint.yaml"
SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        f"https://alice:{SECRET}@host/data",
        f"http://{SECRET}@host:8000/data",  # a token
        f"https://alice:{SECRET}/x@host/data",
        f"https://alice:{SECRET}#x@host/data",
        f"https://alice:{SECRET}?x@host/data",
        f"s3://key:{SECRET}@bucket/data",
        f"sftp://alice:{SECRET}@host/data",
        f"simplecache::https://alice:{SECRET}@host/data",
        f"https://bucket.host/data?X-Amz-Signature={SECRET}",
        f"https://bucket.host/data?mail=a@b&X-Amz-Signature={SECRET}",
        f"abfs://container@account/data?sig={SECRET}",
        f"https://host/data#{SECRET}",
    ],
)
def test_secrets_in_urls_are_refused_unsaid(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"://") as refusal:
        expand_path(url)
    assert SECRET not in str(refusal.value)
    file = tmp_path / "own.yaml"
    file.write_text(f"base: {DIGITS}\ndata: {{shards: '{url}', embedded: none}}\n")
    for path, overrides in (
        (DIGITS, [f"data.shards={url}", "data.embedded=none"]),
        (DIGITS, [f"evaluation.inception={url}"]),
        (DIGITS, [f"data.shard={url}"]),
        (DIGITS, [f"data={url}"]),
        (DIGITS, [f"max_steps={url}"]),
        (DIGITS, [url.replace("=", "")]),
        (file, []),
    ):
        with pytest.raises(ConfigError) as refused:
            load_config(path, overrides)
        assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "url",
    ["https://host:8000/data", "s3://bucket/data", "hf://datasets/me/digits@main/data",
     "sftp://alice@host/data", "abfs://container@account.dfs.core.windows.net/data", "https://host/v@2/data"],
)  # fmt: skip
def test_other_urls_stay_as_they_are(url: str) -> None:
    assert expand_path(url) == url


@pytest.mark.parametrize(
    ("said", "left"),
    [
        (f"403, url='https://cdn/a/b.tar?Expires=1&Signature={SECRET}' (x)", "403, url='https://cdn/a/b.tar?…' (x)"),
        (f"no answer of http://alice:{SECRET}@host/data: gone", "no answer of http://… gone"),
        ("nothing at https://host/data/manifest.json", "nothing at https://host/data/manifest.json"),
    ],
)
def test_messages_lose_the_secrets_alone(said: str, left: str) -> None:
    assert without_secrets(said) == left


def test_configurations_read_no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One from others would carry the user's keys into files that are passed on."""
    monkeypatch.setenv("LZN_DIST_KEY", SECRET)
    file = tmp_path / "own.yaml"
    file.write_text(f"base: {DIGITS}\ntracking: {{project: '${{oc.env:LZN_DIST_KEY}} $LZN_DIST_KEY'}}\n")
    assert SECRET not in load_config(file, ["data.cache=${oc.env:LZN_DIST_KEY}"]).model_dump_json()
    with pytest.raises(ConfigError, match=r"begin with \$HOME alone"):
        load_config(file, ["data.cache=$LZN_DIST_KEY"])
