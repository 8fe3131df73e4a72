"""Masks that annotation formats are known to lose."""

import numpy as np

HEIGHT, WIDTH = 12, 17


def masks() -> dict[str, np.ndarray]:
    """Masks that formats are known to lose: (12, 17) bool."""
    names = ("hole", "two parts", "one pixel", "border", "all")
    found = {name: np.zeros((HEIGHT, WIDTH), bool) for name in names}
    found["hole"][2:9, 3:12] = True
    found["hole"][4:6, 5:9] = False
    found["two parts"][1:3, 1:3] = found["two parts"][8:11, 10:16] = True
    found["one pixel"][7, 4] = True
    found["border"][0, :] = found["border"][:, -1] = True
    found["all"][:] = True
    return found
