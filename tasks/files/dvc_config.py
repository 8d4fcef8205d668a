"""The part of a DVC configuration that can hold no secret, for folders that take over a checkout's remotes."""

import configparser
import re
from pathlib import Path

# Choice: options are listed that are copied, not those that are left out, because a new version of DVC may add a secret.
PUBLIC_OPTIONS = frozenset(
    """
    _ account_name acl allow_agent allow_anonymous_login analytics ask_passphrase ask_password auth cache_regions cert_path
    checksum_jobs configpath connect_timeout connection_timeout credentialpath dir endpointurl gdrive_acknowledge_abuse
    gdrive_service_account_json_file_path gdrive_service_account_user_email gdrive_trash_only gdrive_use_service_account
    gdrive_user_credentials_file gss_auth jobs kerb_ticket kerberos kerberos_principal key_path keyfile listobjects max_sessions
    method no_traverse oss_endpoint port profile projectname protected read_timeout region remote shared slow_link_warning sse
    sse_kms_key_id ssl_verify tenant_id timeout type url use_https use_ssl user verify version_aware worktree
    """.split()  # noqa: SIM905
)


def read_public_config(file: Path) -> configparser.ConfigParser:
    """Read a DVC configuration without options that may hold a secret and without credentials in addresses; empty if absent.

    Secrets reach DVC through the environment. An address keeps its user for ssh, which needs one, and nowhere else.
    """
    config = configparser.ConfigParser(interpolation=None)
    config.read(file)
    for section in config.values():
        for key, value in list(section.items()):
            if key not in PUBLIC_OPTIONS:
                del section[key]
            elif "://" in value:
                section[key] = _remove_credentials(value)
    return config


def _remove_credentials(url: str) -> str:
    """Return an address without password, without user but for ssh, and without the query of a signed http address."""
    url = re.sub(r"""(https?://[^?]*)\?[^"']*""", r"\1", url)
    return re.sub(r"(ssh:)?//([^/@:]*)[^/]*@", lambda found: f"ssh://{found[2]}@" if found[1] else "//", url)
