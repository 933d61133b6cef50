"""The process of `fedalt serve`: its socket, its signals, and what it takes over from a run."""

import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

import uvicorn

from fedalt.serving.engine import ClosedError, Engine
from fedalt.serving.http import Service, app_of
from fedalt.serving.models import open_models
from fedalt.serving.settings import ServeSettings

_LOOK: Final = 2.0  # seconds between two looks for a new best round


def serve(path: Path, settings: ServeSettings, say: Callable[[str], None]) -> bool:
    """Answer until a signal ends it; False where something failed.

    The first SIGINT or SIGTERM lets those who are being answered have the rest, a second one does
    not. Raises ValueError for what cannot be served, and where the port is taken.
    """
    token = settings.token()
    listener = _listen(settings)
    with listener:
        models = open_models(path)
        engine = Engine(models.base, rows=settings.rows, queue=settings.queue)
        service = Service(models, engine, settings)
        server = uvicorn.Server(
            uvicorn.Config(
                app_of(service, token),
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=max(1, round(settings.seconds)),
            )
        )
        engine.on_failure = lambda: setattr(server, "should_exit", True)
        engine.start()
        ended = threading.Event()
        looking = threading.Thread(target=_look, args=(service, ended, say), daemon=True)
        looking.start()
        host, port = listener.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        say(f"http://{place}/v1 answers for {', '.join(models.by_name)}")
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn has its own while it serves, and sends itself the signal again at its end.
            signal.signal(number, lambda *_: None)
        server.run(sockets=[listener])
        healthy = engine.alive
        ended.set()
        engine.close()
    return healthy


def _listen(settings: ServeSettings) -> socket.socket:
    """Take the port before the model is loaded, which takes long."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family)
    except (OSError, TypeError) as error:  # of a name that cannot be written as a host
        why = str(getattr(error, "strerror", None) or "it is no name of a machine")
        why = why.partition(" (")[0]  # Python adds what the sentence says anyway
        raise ValueError(
            f"cannot listen at {settings.host} port {settings.port}: {why}; --port and --host name "
            "another place"
        ) from None


def _look(service: Service, ended: threading.Event, say: Callable[[str], None]) -> None:
    """Take over a new best round; answers that have begun end with the adapters they began with."""
    told = ""
    while not ended.wait(_LOOK):
        try:
            models = service.models.newer(service.engine.between_steps)
        except ClosedError:
            return
        except (ValueError, OSError) as error:
            if str(error) != told:
                told = str(error)
                say(f"note: the models stay as they are: {told}")
            continue
        if models is not None:
            told, service.models.by_name = "", models
            service.engine.counts["reloads"] += 1
            say(f"note: another round is the best now; it answers for {', '.join(models)}")
