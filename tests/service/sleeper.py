"""A process of a service's own that never gets past its imports."""

import time

time.sleep(3600)
