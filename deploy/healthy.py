"""Check a container's health: the SuperLink, proxy or SuperNode in it must answer.

``CLIP2FL_HEALTH_URL`` names what to ask; a SuperNode's own port is the default.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

url = os.environ.get("CLIP2FL_HEALTH_URL", "http://127.0.0.1:9094/health")
# Whether the certificate is the right one is not what is asked here.
context = ssl._create_unverified_context()
try:
    with urllib.request.urlopen(url, timeout=4, context=context) as answer:
        sys.exit(0 if answer.status == 200 else 1)
except (urllib.error.URLError, OSError) as error:
    print(f"{url}: {error}")
    sys.exit(1)
