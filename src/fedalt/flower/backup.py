"""`fedalt federation backup` and `restore`: a server's folder as one file, for another place."""

import tarfile
from pathlib import Path
from typing import Final

from fedalt.core.files import atomic_write, open_private
from fedalt.federation.agreement import Agreement, read_agreement
from fedalt.flower.config import ServerConfig, read_server_config
from fedalt.flower.init import whole_or_nothing
from fedalt.flower.places import read_server_place
from fedalt.runs.folder import StoreError, locked, open_run
from fedalt.runs.settings import SettingsError, to_toml
from fedalt.runs.settings_file import parsed

# Made again, asked for again, or of a process.
_LEFT_OUT: Final = {"flower", "logs", "app.pid", "failed.txt", "incoming", "waiting", "status.json"}


def back_up(config: ServerConfig, file: Path) -> int:
    """Write a server's folder into a new file; the rounds done. The server must not run.

    Raises StoreError where it runs or is damaged, SettingsError where its state lies elsewhere.
    """
    _require_without_ledger(config.terms)
    _require_movable(config.file)
    root, place = config.file.parent, config.place
    for path in (place.folder, place.clients, place.key, place.certificate, place.authority):
        if not path.resolve().is_relative_to(root.resolve()):
            raise SettingsError(f"{path} is not in {root}; only a server's whole folder is kept")
    if file.exists():
        raise StoreError(f"{file} exists already; a backup is a new file")
    if file.resolve().is_relative_to(root.resolve()):
        raise StoreError(f"{file} is in {root} itself; expected a place outside of it")
    with locked(place.folder), locked(place.run):
        rounds = 0
        if (place.run / "run.json").exists():
            run = open_run(place.run)
            rounds = run.progress().rounds_done
            run.require_whole()
        unfinished = file.with_name(f".{file.name}.tmp")
        try:
            with (
                open_private(unfinished, "wb") as stream,
                tarfile.open(fileobj=stream, mode="w") as tar,
            ):
                state = place.folder.resolve().relative_to(root.resolve())
                tar.add(root, arcname=".", filter=lambda entry: _entry(entry, state))
            unfinished.replace(file)
        except OSError as error:
            if error.errno is None or error.filename not in (None, str(unfinished)):
                raise
            raise OSError(error.errno, error.strerror, str(file)) from error
        finally:
            unfinished.unlink(missing_ok=True)
    return rounds


def restore(file: Path, folder: Path) -> int:
    """Make a server's folder out of a backup; the rounds done. Raises StoreError, SettingsError."""
    if folder.exists() and any(folder.iterdir()):
        raise StoreError(f"{folder} exists already and is not empty")
    try:
        with tarfile.open(file) as tar, whole_or_nothing(folder) as unfinished:
            tar.extractall(unfinished, filter="data")
            for path in unfinished.rglob("*"):
                if path.is_dir():  # the filter leaves folders to the umask
                    path.chmod(0o700)
            _require_without_ledger(read_agreement(unfinished / "terms.toml"))
            _require_movable(unfinished / "federation.toml")
    except (tarfile.TarError, EOFError) as error:
        raise StoreError(f"{file} is no backup, or damaged: {error}") from None
    config = read_server_config(folder / "federation.toml")
    run = config.place.run
    if not (run / "run.json").exists():
        return 0
    # Paths of the settings are those of the place where the server is now.
    agreement = read_agreement(folder / "terms.toml")
    atomic_write(run / "settings.toml", to_toml(agreement.settings).encode())
    with locked(run):
        restored = open_run(run)
        rounds = restored.progress().rounds_done
        restored.require_whole()
    return rounds


def _require_without_ledger(agreement: Agreement) -> None:
    """Refuse a federation whose server counts what noise it has spent, which no backup knows."""
    if agreement.settings.privacy.unit == "client":
        raise SettingsError(
            "[privacy] unit = 'client' in the terms: a server restored from a backup would send "
            "rounds again with other noise, and its ledger would not count the first time; to move "
            "the server, stop it and move its whole folder"
        )


def _require_movable(file: Path) -> None:
    """Refuse a federation.toml by which a restored server would go on in the old one's folder."""
    read_server_place(file)  # it is whole
    given = parsed(file).get("server", {})
    for name in ("folder", "clients", "key", "certificate", "authority"):
        if Path(given.get(name, "")).is_absolute():
            raise SettingsError(
                f"{file.name}: [server] {name} = {given[name]!r} is where a restored server would "
                "look, too, in whatever place it is; write a path relative to the file"
            )


def _entry(entry: tarfile.TarInfo, state: Path) -> tarfile.TarInfo | None:
    """What goes into a backup, for its owner alone; `state` is the server's folder in it."""
    path = Path(entry.name)
    below = path.relative_to(state).parts if path.is_relative_to(state) else ()
    if _LEFT_OUT.intersection(below[:2]):
        return None
    if not (entry.isfile() or entry.isdir()) or entry.name.endswith((".lock", ".tmp")):
        return None
    entry.mode = 0o700 if entry.isdir() else 0o600
    entry.uid = entry.gid = 0
    entry.uname = entry.gname = ""
    return entry
