"""What only this host knows: the credentials of the targets and the key of the hash masks."""

from hostagent.credentials.broker import Credential, CredentialUnavailable, Source
from hostagent.credentials.files import CredentialFiles
from hostagent.credentials.keys import mask_key

__all__ = ["Credential", "CredentialFiles", "CredentialUnavailable", "Source", "mask_key"]
