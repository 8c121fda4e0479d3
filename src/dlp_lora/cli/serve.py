"""The serve command."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dlp_lora.cli.common import EngineOptions, HubOptions, open_engine, say
from dlp_lora.cli.options import with_options
from dlp_lora.files import name_of
from dlp_lora.serve.settings import ServerSettings

if TYPE_CHECKING:
    from dlp_lora.serve.keys import Keys


@dataclass(frozen=True, kw_only=True)
class KeyOptions:
    """Who may ask, and who may manage adapters. On a command line, keys can be read by others on the machine."""

    api_key: Annotated[
        str | None, typer.Option(help="Key that clients must send; better in DLP_LORA_API_KEY.", show_default=False)
    ] = None
    keys: Annotated[
        Path | None, typer.Option(help='File of keys: {"key": ["adapter", ...], "another key": null (all)}.')
    ] = None
    admin_key: Annotated[
        str | None,
        typer.Option(help="Key that manages adapters; better in DLP_LORA_ADMIN_KEY.", show_default=False),
    ] = None


@with_options
def serve(
    engine_options: EngineOptions, hub_options: HubOptions, key_options: KeyOptions, settings: ServerSettings
) -> None:
    """Answer over HTTP as OpenAI's API does, with a playground at /; needs the extra `serve`.

    Example: `dlp-lora serve --bundle demo/bundle`
    """
    try:
        import fastapi  # noqa: F401
    except ImportError as error:
        raise ValueError('the server needs more packages: pip install "dlp-lora[serve]"') from error
    from dlp_lora.serve.logs import log_as_json
    from dlp_lora.serve.server import listen
    from dlp_lora.serve.server import serve as run

    keys = keys_of(key_options)
    listener = listen(settings)
    engine = open_engine(engine_options, hub_options, need_router=False)
    bundle = engine_options.bundle
    log_as_json()
    run(
        engine,
        settings,
        keys,
        name=name_of(bundle or engine_options.adapters or "dlp-lora"),
        bundle=Path(bundle) if bundle is not None and Path(bundle).is_dir() else None,
        listener=listener,
        on_ready=lambda address: say(f"the playground is at {address}/, the API at {address}/v1"),
    )


def keys_of(options: KeyOptions) -> "Keys":
    """Reads keys from the command line, the environment and a file.

    Raises:
        ValueError: if the file holds no keys, or one has two meanings.
    """
    from dlp_lora.serve.keys import ADMIN_KEY, API_KEY, Keys, read_keys

    users = {} if options.keys is None else read_keys(options.keys)
    api_key = options.api_key or os.environ.get(API_KEY)
    if api_key in users:
        raise ValueError("the key of --api-key stands in the file of --keys, too; take it out of one of them")
    if api_key:
        users[api_key] = None
    return Keys(users, admin=options.admin_key or os.environ.get(ADMIN_KEY))
