"""Storage: one door to Azurite or the stub, and what the plane itself reads and writes through it."""

from __future__ import annotations

import base64
import datetime as dt
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from . import azurite
from .blobstub import BlobStub, error
from .web import Reply, Request

# The SDK builds `https://ACCOUNT.blob.ENDPOINT/CONTAINER`. With an address and a path as the account, what it builds is
# a path-style address on loopback, and no name has to be resolved: https://127.0.0.1:PORT/llmkit.blob.core.windows.net
ENDPOINT = "core.windows.net"
SHORT = "llmkit"
ACCOUNT = f"{SHORT}.blob.{ENDPOINT}"
CONTAINER, ARTIFACTS = "azureml-blobstore", "azureml"  # of workspaceblobstore and workspaceartifactstore


class Blobs:
    """The storage account of the workspace."""

    def __init__(self, folder: Path, kind: str = "auto") -> None:
        self.key = base64.b64encode(secrets.token_bytes(32)).decode()
        self.inside = secrets.token_hex(8)  # marks the plane's own requests: no fault meets them
        command = azurite.find() if kind != "stub" else []
        if kind == "azurite" and not command:
            raise RuntimeError("no Azurite here: npm install --prefix .azurite azurite")
        self.server: Any = azurite.Azurite(command, folder, ACCOUNT, self.key) if command else BlobStub()
        self.kind = "azurite" if command else "stub"
        self.base = self.certificate = ""

    def open(self, base: str, certificate: str) -> None:
        """Learn the address of the door, and make the containers."""
        self.base, self.certificate = base, certificate
        for name in (CONTAINER, ARTIFACTS):
            self.client(name).create_container(headers=self.mine)

    @property
    def account(self) -> str:
        """The account name that makes the SDK build the address of the door."""
        return f"{self.base.removeprefix('https://')}/{SHORT}"

    @property
    def url(self) -> str:
        """The address of the account."""
        return f"{self.base}/{ACCOUNT}"

    def answer(self, request: Request) -> Reply:
        """A request of anybody; a signature that has expired is refused by the stub too."""
        until = request.query.get("se")
        if until and dt.datetime.fromisoformat(until.replace("Z", "+00:00")) < dt.datetime.now(dt.UTC):
            return error(403, "AuthenticationFailed")
        if not until and "authorization" not in request.headers:
            return error(401, "NoAuthenticationInformation")
        return self.server.answer(request)

    def client(self, container: str) -> Any:
        """The real SDK's client, with the account's key."""
        from azure.core.credentials import AzureNamedKeyCredential
        from azure.storage.blob import ContainerClient

        credential = AzureNamedKeyCredential(ACCOUNT, self.key)
        return ContainerClient(self.url, container, credential=credential, connection_verify=self.certificate)

    def sas(self, container: str, lifetime: float, blob: str = "") -> str:
        """A signed address of a container or a blob, good for `lifetime` seconds."""
        from azure.storage.blob import (
            BlobSasPermissions,
            ContainerSasPermissions,
            generate_blob_sas,
            generate_container_sas,
        )

        until = dt.datetime.now(dt.UTC) + dt.timedelta(seconds=lifetime)
        if blob:
            may = BlobSasPermissions(read=True)
            token = generate_blob_sas(ACCOUNT, container, blob, account_key=self.key, permission=may, expiry=until)
            return f"{self.url}/{container}/{blob}?{token}"
        every = ContainerSasPermissions(read=True, write=True, list=True, create=True, add=True)
        token = generate_container_sas(ACCOUNT, container, account_key=self.key, permission=every, expiry=until)
        return f"{self.url}/{container}?{token}"

    @property
    def mine(self) -> dict[str, str]:
        """The header that marks the plane's own requests."""
        return {"x-plane": self.inside}

    def make(self, container: str) -> None:
        """A container for one upload."""
        self.client(container).create_container(headers=self.mine)

    def download(self, container: str, prefix: str, folder: Path) -> int:
        """Copy what lies at or below a prefix into a folder; how many files that were."""
        client, count, mine = self.client(container), 0, self.mine
        prefix = prefix.strip("/")
        for item in client.list_blobs(name_starts_with=prefix or None, headers=mine):
            if prefix and item.name != prefix and not item.name.startswith(prefix + "/"):
                continue
            name = item.name.removeprefix(prefix).strip("/") or Path(item.name).name
            target = folder / name
            if not target.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"blob {item.name} leaves its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(client.download_blob(item.name, headers=mine).readall())
            count += 1
        return count

    def upload(self, folder: Path, container: str, prefix: str) -> None:
        """Copy a folder's files below a prefix."""
        client = self.client(container)
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as data:
                name = f"{prefix.strip('/')}/{path.relative_to(folder).as_posix()}"
                client.upload_blob(name, data, overwrite=True, headers=self.mine)

    def place(self, uri: str) -> tuple[str, str]:
        """Container and path of a datastore URI or a blob address."""
        if uri.startswith("https://"):
            container, _, path = uri.partition(f"/{ACCOUNT}/")[2].partition("?")[0].partition("/")
            return container, unquote(path)
        _, _, rest = uri.partition("datastores/")
        store, _, path = rest.partition("/")
        names = {"workspaceartifactstore": ARTIFACTS, "workspaceblobstore": CONTAINER}
        if store not in names:
            raise ValueError(f"{uri} is on no datastore of this workspace")
        return names[store], path.removeprefix("paths/")

    def close(self) -> None:
        """End the server behind the door."""
        self.server.close()
