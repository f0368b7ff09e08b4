"""Members of samples: a picture, and an object that does harm when it is unpickled."""

import io
import os

from PIL import Image


def png(color=0, size=(8, 8)):
    target = io.BytesIO()
    Image.new("RGB", size, (color, 0, 0)).save(target, "PNG")
    return target.getvalue()


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
