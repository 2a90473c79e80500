"""Exit 0 when the server in this container is ready, 1 when it is not. Standard library only."""  # noqa: INP001 - a script that the image runs by its path

import os
import sys
import urllib.error
import urllib.request


def main() -> int:
    """Read /health/ready on the port that PREFIXD_PORT names."""
    url = f"http://127.0.0.1:{os.environ.get('PREFIXD_PORT', '8000')}/health/ready"
    # No proxy inside the container, regardless of the environment.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=4):
            return 0
    except (urllib.error.URLError, OSError) as error:
        sys.stderr.write(f"{url}: {error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
