from enum import Enum

from torchvision import no_images


class ImageReadMode(Enum):
    UNCHANGED = 0
    RGB = 3


decode_image = decode_jpeg = no_images
