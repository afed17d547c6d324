//! Whole requests with whole pictures, made here.
use std::io::Cursor;

use bytes::Bytes;
use http_body_util::BodyExt;
use image::{
    ColorType, DynamicImage, GenericImageView, ImageDecoder, ImageEncoder, ImageFormat, ImageReader, Luma,
    Rgb, RgbImage, Rgba, RgbaImage,
    codecs::{jpeg::JpegEncoder, png::PngEncoder},
};
use proptest::prelude::*;

use super::*;

const RED: Rgb<u8> = Rgb([255, 0, 0]);
const GREEN: Rgb<u8> = Rgb([0, 255, 0]);
const BLUE: Rgb<u8> = Rgb([0, 0, 255]);

/// Red, green and blue from left to right.
fn flag(width: u32, height: u32) -> DynamicImage {
    RgbImage::from_fn(width, height, |x, _| [RED, GREEN, BLUE][(3 * x / width) as usize]).into()
}

fn encoded(image: &DynamicImage, format: ImageFormat) -> Vec<u8> {
    let mut bytes = Vec::new();
    image.write_to(&mut Cursor::new(&mut bytes), format).unwrap();
    bytes
}

async fn send(request: Request<Body>) -> (u16, String, Bytes) {
    let response = answer(&Workshop::new(), request).await;
    let content_type = response.headers()[CONTENT_TYPE].to_str().unwrap().to_owned();
    let status = response.status().as_u16();
    (status, content_type, response.into_body().collect().await.unwrap().to_bytes())
}

async fn post(query: &str, body: impl Into<Vec<u8>>) -> (u16, String, Bytes) {
    send(Request::post(format!("/?{query}")).body(Body::from(body.into())).unwrap()).await
}

async fn refused(query: &str, body: impl Into<Vec<u8>>) -> (u16, String) {
    let (status, content_type, body) = post(query, body).await;
    assert_eq!(content_type, "text/plain; charset=utf-8");
    (status, String::from_utf8(body.to_vec()).unwrap())
}

async fn resized(query: &str, body: impl Into<Vec<u8>>) -> DynamicImage {
    let (status, content_type, body) = post(query, body).await;
    assert_eq!(status, 200, "{query}: {body:?}");
    let reader = ImageReader::new(Cursor::new(body)).with_guessed_format().unwrap();
    assert_eq!(reader.format().unwrap().to_mime_type(), content_type);
    reader.decode().unwrap()
}

fn assert_near(image: &DynamicImage, (x, y): (u32, u32), color: Rgb<u8>) {
    let Rgba([red, green, blue, _]) = image.get_pixel(x, y);
    let distance: u32 = [red, green, blue].iter().zip(color.0).map(|(a, b)| u32::from(a.abs_diff(b))).sum();
    assert!(distance < 30, "({x}, {y}) is {red} {green} {blue} and not {color:?}");
}

#[tokio::test]
async fn every_format_becomes_every_other() {
    let formats = [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP];
    for from in formats {
        let picture = encoded(&flag(90, 60), from);
        assert_eq!(resized("width=45", picture.clone()).await.dimensions(), (45, 30));
        let (_, content_type, _) = post("height=30", picture.clone()).await;
        assert_eq!(content_type, from.to_mime_type());
        for to in formats {
            let name = to.extensions_str()[0];
            let result = resized(&format!("width=300&format={name}"), picture.clone()).await;
            assert_eq!(result.dimensions(), (300, 200));
            for (x, color) in [(50, RED), (150, GREEN), (250, BLUE)] {
                assert_near(&result, (x, 100), color);
            }
            let same_size = resized(&format!("format={name}"), picture.clone()).await;
            assert_eq!(same_size.dimensions(), (90, 60));
        }
    }
}

#[tokio::test]
async fn a_picture_meets_a_box_as_the_fit_says() {
    let picture = encoded(&flag(90, 30), ImageFormat::Png);
    let contained = resized("width=30&height=30", picture.clone()).await;
    assert_eq!(contained.dimensions(), (30, 10));
    let filled = resized("width=30&height=30&fit=fill", picture.clone()).await;
    assert_eq!(filled.dimensions(), (30, 30));
    assert_near(&filled, (2, 15), RED);
    assert_near(&filled, (27, 15), BLUE);
    let covered = resized("width=30&height=30&fit=cover", picture).await;
    assert_eq!(covered.dimensions(), (30, 30));
    for x in [0, 15, 29] {
        assert_near(&covered, (x, 15), GREEN);
    }
}

/// EXIF data with nothing but an orientation.
fn exif(orientation: u8) -> Vec<u8> {
    let mut exif = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
    exif.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
    exif
}

#[tokio::test]
async fn photos_are_turned_upright() {
    let flag = flag(90, 30);
    // Which corner of the upright picture shows the stored one's left end (EXIF 2.32, tag 274).
    let (left, right, top, bottom) = ((2, 5), (27, 5), (5, 2), (5, 27));
    let ends = [(1, left), (2, right), (3, right), (4, left), (5, top), (6, top), (7, bottom), (8, bottom)];
    for (orientation, red_end) in ends {
        let mut photo = Vec::new();
        let mut encoder = JpegEncoder::new_with_quality(&mut photo, 95);
        encoder.set_exif_metadata(exif(orientation)).unwrap();
        encoder.write_image(flag.as_bytes(), 90, 30, flag.color().into()).unwrap();
        let upright = resized("width=30&height=30&format=png", photo.clone()).await;
        let expected = if orientation < 5 { (30, 10) } else { (10, 30) };
        assert_eq!(upright.dimensions(), expected, "{orientation}");
        assert_near(&upright, red_end, RED);
        let covered = resized("width=20&height=30&fit=cover&format=png", photo).await;
        assert_eq!(covered.dimensions(), (20, 30));
        assert_near(&covered, (10, 15), GREEN);
    }
}

#[tokio::test]
async fn transparency_is_kept_or_shown_on_white() {
    let glass: DynamicImage = RgbaImage::from_pixel(20, 20, Rgba([0, 0, 255, 0])).into();
    let picture = encoded(&glass, ImageFormat::Png);
    for format in ["png", "webp"] {
        let kept = resized(&format!("width=10&format={format}"), picture.clone()).await;
        assert_eq!(kept.get_pixel(5, 5)[3], 0, "{format}");
    }
    let shown = resized("width=10&format=jpeg", picture).await;
    assert_near(&shown, (5, 5), Rgb([255, 255, 255]));
}

#[tokio::test]
async fn channels_and_depths_are_kept_where_the_format_has_them() {
    let deep: DynamicImage = image::ImageBuffer::from_pixel(8, 8, Luma([30_000u16])).into();
    for image in
        [deep.clone(), deep.to_luma_alpha16().into(), deep.to_rgb16().into(), deep.to_rgba16().into()]
    {
        let picture = encoded(&image, ImageFormat::Png);
        assert_eq!(resized("width=4", picture.clone()).await.color(), image.color());
        for format in ["webp", "jpeg"] {
            let result = resized(&format!("width=4&format={format}"), picture.clone()).await;
            let value = u32::from(result.get_pixel(2, 2)[0]);
            assert!(value.abs_diff(30_000 / 257) <= 3, "{format} {:?}: {value}", image.color());
        }
    }
    let grey = encoded(&deep.to_luma8().into(), ImageFormat::Jpeg);
    assert_eq!(resized("width=4", grey).await.color(), ColorType::L8);
}

#[tokio::test]
async fn a_colour_profile_stays_with_its_channels() {
    let mut profile = vec![0; 128];
    profile[16..20].copy_from_slice(b"RGB ");
    let flag = flag(9, 9);
    let mut picture = Vec::new();
    let mut encoder = PngEncoder::new(&mut picture);
    encoder.set_icc_profile(profile.clone()).unwrap();
    encoder.write_image(flag.as_bytes(), 9, 9, flag.color().into()).unwrap();
    for format in ["png", "jpeg", "webp"] {
        let (_, _, result) = post(&format!("width=3&format={format}"), picture.clone()).await;
        let reader = ImageReader::new(Cursor::new(result)).with_guessed_format().unwrap();
        assert_eq!(reader.into_decoder().unwrap().icc_profile().unwrap(), Some(profile.clone()), "{format}");
    }
}

/// A PNG picture of one pixel whose header claims something else.
fn claiming(width: u32, height: u32, depth: u8, color: u8) -> Vec<u8> {
    let mut picture = encoded(&RgbImage::new(1, 1).into(), ImageFormat::Png);
    picture[16..20].copy_from_slice(&width.to_be_bytes());
    picture[20..24].copy_from_slice(&height.to_be_bytes());
    (picture[24], picture[25]) = (depth, color);
    let crc = crc32(&picture[12..29]);
    picture[29..33].copy_from_slice(&crc.to_be_bytes());
    picture
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[tokio::test]
async fn a_picture_that_claims_too_much_is_refused_by_its_header() {
    const RGB: u8 = 2;
    const RGBA: u8 = 6;
    for (width, height, depth, color, word) in [
        (16_385, 1, 8, RGB, "16385 x 1"),
        (8192, 8192, 8, RGB, "8192 x 8192"),
        (0x7fff_ffff, 0x7fff_ffff, 16, RGBA, "192 MiB"),
        (5700, 5700, 16, RGBA, "192 MiB"),
    ] {
        let (status, sentence) = refused("width=1", claiming(width, height, depth, color)).await;
        assert_eq!(status, 422, "{sentence}");
        assert!(sentence.contains(word) && sentence.ends_with(".\n"), "{sentence}");
    }
    let (status, sentence) = refused("width=1", claiming(5000, 5000, 8, RGB)).await;
    assert!(status == 422 && sentence.contains("can't be read"), "{sentence}");
}

#[tokio::test]
async fn what_is_no_picture_is_refused() {
    let gif = b"GIF89a\x01\0\x01\0\0\0\0;".to_vec();
    for body in [b"hello".to_vec(), gif, b"<svg/>".to_vec(), vec![0x89]] {
        assert_eq!(refused("width=1", body).await.0, 415);
    }
    assert_eq!(refused("width=1", "").await.0, 400);
    assert_eq!(refused("widht=1", encoded(&flag(3, 3), ImageFormat::Png)).await.0, 400);
    assert_eq!(
        refused("width=4097&height=4097&fit=fill", encoded(&flag(3, 3), ImageFormat::Png)).await.0,
        422
    );
    assert_eq!(refused("width=1", vec![0; (workshop::MAX_BODY_BYTES + 1) as usize]).await.0, 413);
    let zipped = Request::post("/?width=1").header(CONTENT_ENCODING, "gzip").body(Body::from("x")).unwrap();
    assert_eq!(send(zipped).await.0, 415);
}

#[tokio::test]
async fn methods_do_what_they_say() {
    let (status, _, usage) = send(Request::get("/").body(Body::empty()).unwrap()).await;
    assert_eq!((status, &usage[..]), (200, USAGE.as_bytes()));
    let put = Request::put("/?width=2").body(Body::from(encoded(&flag(3, 3), ImageFormat::Png))).unwrap();
    assert_eq!(send(put).await.0, 200);
    for (method, status) in [("DELETE", 405), ("PATCH", 405), ("BREW", 405), ("OPTIONS", 204)] {
        let request = Request::builder().method(method).uri("/").body(Body::empty()).unwrap();
        let response = answer(&Workshop::new(), request).await;
        assert_eq!(response.status(), status, "{method}");
        assert_eq!(response.headers()[ALLOW], "GET, HEAD, POST, PUT, OPTIONS");
    }
}

#[test]
fn a_picture_cut_anywhere_is_an_error_or_a_picture() {
    let parameters = Parameters::parse("width=5").unwrap();
    for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP] {
        let picture = encoded(&flag(24, 24), format);
        for end in 0..picture.len() {
            if let Ok(result) = picture::resize(&picture[..end], &parameters) {
                assert_eq!(image::load_from_memory(&result.bytes).unwrap().dimensions(), (5, 5));
            }
        }
    }
}

proptest! {
    #[test]
    fn altered_pictures_are_errors_or_pictures(
        format in prop::sample::select(&[ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP][..]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20),
    ) {
        let mut picture = encoded(&flag(24, 24), format);
        for (index, value) in changes {
            let at = index.index(picture.len());
            picture[at] = value;
        }
        if let Ok(result) = picture::resize(&picture, &Parameters::parse("width=5&height=5&fit=fill").unwrap()) {
            prop_assert_eq!(image::load_from_memory(&result.bytes).unwrap().dimensions(), (5, 5));
        }
    }
}
