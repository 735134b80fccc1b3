"""The field `webhook` of a request: where its client wants the job's end to be told. No I/O, so no name is looked up.

For every route that accepts jobs: `webhook: WebhookRequest | None = None` in its request, and `webhook_target` for the
submission.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, SecretStr, StringConstraints, field_validator

from api.errors import InvalidRequestError
from shared.destinations import MAX_URL_LENGTH, DestinationError, destination
from shared.jobs import WebhookTarget
from shared.settings import Settings
from shared.signing import signing_key

MAX_SECRET_LENGTH = 100


class WebhookRequest(BaseModel):
    """What a request may say. Unlike elsewhere in it, a misspelt field is refused: nobody would notice it otherwise."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, hide_input_in_errors=True)

    url: Annotated[str, StringConstraints(max_length=MAX_URL_LENGTH)]
    secret: SecretStr | None = Field(None, max_length=MAX_SECRET_LENGTH)  # None: signed with the deployment's

    @field_validator("secret")
    @classmethod
    def _secret_is_a_key(cls, secret: SecretStr | None) -> SecretStr | None:
        if secret is not None:
            signing_key(secret.get_secret_value())
        return secret


def webhook_target(webhook: WebhookRequest | None, settings: Settings) -> WebhookTarget | None:
    """Where the request's own webhook goes; None: it has none. Raises InvalidRequestError, naming the parameter."""
    if webhook is None:
        return None
    try:
        destination(webhook.url, public_only=not settings.webhook_allow_private)
    except DestinationError as error:
        raise InvalidRequestError(f"webhook.url: {error}", param="webhook.url") from None
    if webhook.secret is None and not settings.webhook_secret:
        raise InvalidRequestError(
            "webhook.secret: is required, since this deployment has no secret of its own", param="webhook.secret"
        )
    secret = None if webhook.secret is None else webhook.secret.get_secret_value()
    return WebhookTarget(url=webhook.url, secret=secret)
