"""Who may call: a certificate for loopback, and tokens that expire."""

from __future__ import annotations

import datetime as dt
import ipaddress
import secrets
import ssl
import time
from pathlib import Path
from typing import Any

import jwt

from .web import ArmError, Request

TENANT = "11111111-2222-3333-4444-555555555555"
AUDIENCE = "https://ml.llmkit.test"


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A self-signed certificate for 127.0.0.1 and its key, valid for two days."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).add_extension(
        x509.SubjectAlternativeName(names), False
    )
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    builder = builder.not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=2))
    certificate, private = folder / "certificate.pem", folder / "key.pem"
    certificate.write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    form = serialization.PrivateFormat.PKCS8
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    private.chmod(0o600)
    return certificate, private


def tls(certificate: Path, key: Path) -> ssl.SSLContext:
    """What a server needs to speak https with it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    return context


class Identity:
    """Issues tokens and checks them."""

    def __init__(self) -> None:
        self.secret = secrets.token_hex(32)
        self.not_before = 0.0  # tokens issued earlier count as expired

    def token(self, lifetime: float = 3600, tenant: str = TENANT, audience: str = AUDIENCE) -> str:
        """A token that is good for `lifetime` seconds."""
        now = time.time()
        claims = {"aud": audience, "tid": tenant, "iat": now, "nbf": int(now) - 5, "exp": now + lifetime}
        claims |= {"oid": "0a0a0a0a-0000-0000-0000-000000000001", "upn": "somebody@llmkit.test"}
        return jwt.encode(claims, self.secret, algorithm="HS256")

    def expire(self) -> None:
        """All tokens issued so far are too old from now on."""
        self.not_before = time.time()

    def check(self, request: Request) -> dict[str, Any]:
        """The claims of a request's token, or 401 as Azure Resource Manager says it."""
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer":
            raise ArmError(401, "AuthenticationFailed", "Authentication failed. The 'Authorization' header is missing.")
        try:
            claims = jwt.decode(token, self.secret, algorithms=["HS256"], audience=AUDIENCE, leeway=0)
            if claims["iat"] < self.not_before:
                raise jwt.ExpiredSignatureError
        except jwt.ExpiredSignatureError:
            raise ArmError(
                401, "ExpiredAuthenticationToken", "The access token expiry UTC time is in the past."
            ) from None
        except jwt.PyJWTError as e:
            raise ArmError(401, "InvalidAuthenticationToken", f"The access token is invalid: {e}.") from None
        if claims["tid"] != TENANT:
            text = (
                f"The access token is from the wrong issuer. It must match the tenant '{TENANT}' of this subscription."
            )
            raise ArmError(401, "InvalidAuthenticationTokenTenant", text)
        return claims
