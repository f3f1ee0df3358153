"""A process of a service's own that never gets past its imports."""

import time

if __name__ == "__main__":
    time.sleep(3600)
