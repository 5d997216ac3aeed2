"""Images to the bytes of files that `decode_image` reads."""

import io

import numpy as np

JPEG_QUALITY = 95


def encode_image(image: np.ndarray, lossless: bool) -> bytes:
    """Return the bytes of an image file.

    Args:
        image: uint8 or uint16 `[height, width, channels]`.
        lossless: False allows JPEG, for 8 bits and 1 or 3 channels. Otherwise 1, 3 and 4 channels
            become PNG, any other number `.npy`.
    """
    channels = image.shape[2]
    if channels not in (1, 3, 4):
        buffer = io.BytesIO()
        np.save(buffer, image, allow_pickle=False)
        return buffer.getvalue()
    import cv2

    in_its_order = np.ascontiguousarray(
        image[..., [[0], [], [2, 1, 0], [2, 1, 0, 3]][channels - 1]]
    )
    if not lossless and image.dtype == np.uint8 and channels != 4:
        options = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        return cv2.imencode(".jpg", in_its_order, options)[1].tobytes()
    return cv2.imencode(".png", in_its_order)[1].tobytes()
