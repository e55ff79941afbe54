"""Check the health of a container's SuperLink, proxy or SuperNode.

``CLIP2FL_HEALTH_URL`` is the URL to request; the default is a SuperNode's own port.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

url = os.environ.get("CLIP2FL_HEALTH_URL", "http://127.0.0.1:9094/health")
# The certificate is not checked, since this is only a health check.
context = ssl._create_unverified_context()
try:
    # Without a proxy of the environment: the part is in this container.
    opener = urllib.request.build_opener(
        urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    )
    with opener.open(url, timeout=4) as answer:
        sys.exit(0 if answer.status == 200 else 1)
except (urllib.error.URLError, OSError) as error:
    print(f"{url}: {error}")
    sys.exit(1)
