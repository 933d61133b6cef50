"""How a server is reached, and what it takes at most."""

from pathlib import Path
from typing import Annotated, Final

from fedalt.core.declared import SettingsError, declared, setting

LOOPBACK: Final = ("127.0.0.1", "::1", "localhost")


@declared
class ServeSettings:
    """Settings of `fedalt serve`."""

    host: Annotated[str, setting("Address to listen at; by default this machine alone.")] = (
        LOOPBACK[0]
    )
    port: Annotated[int, setting("Port to listen at; 0 takes a free one.", ge=0, le=65535)] = 8000
    token_file: Annotated[
        Path | None, setting("File with the token that requests have to bring.", strict=False)
    ] = None
    rows: Annotated[int, setting("Requests answered at once.", ge=1)] = 16
    queue: Annotated[
        int, setting("Requests that may wait, those that begin at once among them.", ge=1)
    ] = 64
    max_tokens: Annotated[int, setting("Longest answer, in tokens.", ge=1)] = 1024
    max_bytes: Annotated[int, setting("Largest request, in bytes.", ge=1)] = 2**20
    seconds: Annotated[
        float, setting("Longest time from a request to the end of its answer.", gt=0)
    ] = 300.0

    def token(self) -> str | None:
        """The token of the file; None without one. Raises SettingsError."""
        if self.token_file is None:
            if self.host not in LOOPBACK:
                raise SettingsError(
                    f"--host {self.host} answers whoever can reach it; --token-file FILE names a "
                    "file with a token that every request has to bring"
                )
            return None
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            why = getattr(error, "strerror", None) or "it is not a text"
            raise SettingsError(f"--token-file {self.token_file}: {why}") from None
        if not token or not token.isascii() or any(sign.isspace() for sign in token):
            raise SettingsError(
                f"--token-file {self.token_file}: expected one word in ASCII, such as "
                "`openssl rand -hex 32` prints"
            )
        return token
