//! From a picture's bytes to those of the result.
use std::io::Cursor;

use fast_image_resize::{ResizeOptions, Resizer};
use image::{
    ColorType, DynamicImage, ImageDecoder, ImageEncoder, ImageError, ImageReader, Limits, Pixel, RgbImage,
    RgbaImage,
    codecs::{jpeg::JpegEncoder, png::PngEncoder, webp::WebPEncoder},
    metadata::Orientation,
};

use crate::{
    geometry::{Plan, Size},
    parameters::{Format, Parameters},
    refusal::Refusal,
};

/// A side of what is taken; WebP has no larger ones.
pub const MAX_SIDE: u32 = 16_384;
/// Pixels of what is taken: a 32-megapixel camera's.
pub const MAX_PIXELS: u64 = 32 << 20;
/// What a picture may take when it is decoded: the most pixels with four channels, or with three of 16 bits.
pub const MAX_DECODED_BYTES: u64 = 192 << 20;

/// The decoders' own tables and rows, beside the pixels.
const DECODER_BYTES: u64 = 64 << 20;

/// Where JPEG's artefacts are hard to see and its size is still small.
const JPEG_QUALITY: u8 = 85;

pub struct Picture {
    pub bytes: Vec<u8>,
    pub format: Format,
}

/// Decodes, turns upright, resizes and encodes. Takes processor time and memory, both bounded by what the picture's
/// header says before its pixels are looked at.
pub fn resize(bytes: &[u8], parameters: &Parameters) -> Result<Picture, Refusal> {
    let own_format = Format::of(bytes).ok_or(Refusal::UnknownFormat)?;
    let mut decoder = open(bytes, own_format)?;
    let orientation = decoder.orientation().unwrap_or(Orientation::NoTransforms);
    // A picture without its profile is still a picture.
    let profile = decoder.icc_profile().ok().flatten();
    let stored = Size { width: decoder.dimensions().0, height: decoder.dimensions().1 };
    let is_turned = turns(orientation);
    let plan = Plan::new(if is_turned { stored.turned() } else { stored }, parameters)?;

    let source = DynamicImage::from_decoder(decoder).map_err(of_decoding)?;
    // Turning the smaller of the two costs less, and it is the result more often than not.
    let mut result = if is_turned {
        scale(source, stored, (plan.used.1, plan.used.0), plan.result.turned())?
    } else {
        scale(source, stored, plan.used, plan.result)?
    };
    result.apply_orientation(orientation);

    let format = parameters.format.unwrap_or(own_format);
    let bytes = encode(result, format, profile).map_err(|error| {
        tracing::error!(%error, ?format, "can't encode a picture");
        Refusal::Failed
    })?;
    Ok(Picture { bytes, format })
}

/// Reads the header and refuses what is too large.
fn open(bytes: &[u8], format: Format) -> Result<impl ImageDecoder, Refusal> {
    let mut limits = Limits::default();
    limits.max_alloc = Some(MAX_DECODED_BYTES + DECODER_BYTES);
    let mut reader = ImageReader::with_format(Cursor::new(bytes), format.image_format());
    reader.limits(limits);
    let decoder = reader.into_decoder().map_err(of_decoding)?;
    let (width, height) = decoder.dimensions();
    if width == 0 || height == 0 {
        return Err(Refusal::TooManyPixels { width, height });
    }
    if width.max(height) > MAX_SIDE || u64::from(width) * u64::from(height) > MAX_PIXELS {
        return Err(Refusal::TooManyPixels { width, height });
    }
    if decoder.total_bytes() > MAX_DECODED_BYTES {
        return Err(Refusal::TooMuchMemory);
    }
    Ok(decoder)
}

fn of_decoding(error: ImageError) -> Refusal {
    match error {
        ImageError::Limits(_) => Refusal::TooMuchMemory,
        error => Refusal::Broken(error),
    }
}

/// Whether an upright picture has its sides exchanged.
fn turns(orientation: Orientation) -> bool {
    use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
    matches!(orientation, Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH)
}

/// Makes a picture of this size from the middle part of `source`.
fn scale(source: DynamicImage, size: Size, used: (f64, f64), result: Size) -> Result<DynamicImage, Refusal> {
    let whole = (f64::from(size.width), f64::from(size.height));
    if size == result && used == whole {
        return Ok(source);
    }
    let (left, top) = ((whole.0 - used.0) / 2.0, (whole.1 - used.1) / 2.0);
    let options = ResizeOptions::new().crop(left, top, used.0, used.1);
    let mut scaled = DynamicImage::new(result.width, result.height, source.color());
    Resizer::new().resize(&source, &mut scaled, &options).map_err(|error| {
        tracing::error!(%error, ?size, ?used, ?result, "can't resize a picture");
        Refusal::Failed
    })?;
    Ok(scaled)
}

fn encode(image: DynamicImage, format: Format, profile: Option<Vec<u8>>) -> Result<Vec<u8>, ImageError> {
    let image = match format {
        Format::Png => image,
        Format::WebP => with_8_bits(image),
        Format::Jpeg => opaque(with_8_bits(image)),
    };
    let mut bytes = Vec::new();
    match format {
        Format::Png => write(PngEncoder::new(&mut bytes), &image, profile),
        Format::WebP => write(WebPEncoder::new_lossless(&mut bytes), &image, profile),
        Format::Jpeg => write(JpegEncoder::new_with_quality(&mut bytes, JPEG_QUALITY), &image, profile),
    }?;
    Ok(bytes)
}

fn write(
    mut encoder: impl ImageEncoder,
    image: &DynamicImage,
    profile: Option<Vec<u8>>,
) -> Result<(), ImageError> {
    if let Some(profile) = profile.filter(|profile| describes(profile, image.color())) {
        encoder
            .set_icc_profile(profile)
            .unwrap_or_else(|error| tracing::debug!(%error, "the result has no colour profile"));
    }
    encoder.write_image(image.as_bytes(), image.width(), image.height(), image.color().into())
}

/// Whether a profile is for these channels: decoding may have changed them, as it does CMYK's.
fn describes(profile: &[u8], color: ColorType) -> bool {
    // The data colour space is the 4 bytes at 16 (ICC.1 §7.2.6).
    let space = profile.get(16..20);
    space == Some(if color.has_color() { b"RGB " } else { b"GRAY" })
}

fn with_8_bits(image: DynamicImage) -> DynamicImage {
    match image.color() {
        ColorType::L16 => image.into_luma8().into(),
        ColorType::La16 => image.into_luma_alpha8().into(),
        ColorType::Rgb16 => image.into_rgb8().into(),
        ColorType::Rgba16 => image.into_rgba8().into(),
        _ => image,
    }
}

/// What has no transparency is shown on white.
fn opaque(image: DynamicImage) -> DynamicImage {
    match image {
        image if !image.color().has_alpha() => image,
        image => on_white(&image.into_rgba8()).into(),
    }
}

fn on_white(image: &RgbaImage) -> RgbImage {
    let white = |channel: u8, alpha: u8| {
        let (channel, alpha) = (u32::from(channel), u32::from(alpha));
        ((channel * alpha + 255 * (255 - alpha) + 127) / 255) as u8
    };
    let mut opaque = RgbImage::new(image.width(), image.height());
    for (pixel, transparent) in opaque.pixels_mut().zip(image.pixels()) {
        let [red, green, blue, alpha] = transparent.0;
        *pixel = *image::Rgb::from_slice(&[red, green, blue].map(|channel| white(channel, alpha)));
    }
    opaque
}
