//! What a request's query asks for.
use image::ImageFormat;

use crate::{geometry::MAX_OUTPUT_SIDE, refusal::Refusal};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parameters {
    /// At least 1; one side alone keeps the proportions, none the size.
    pub width: Option<u32>,
    pub height: Option<u32>,
    pub fit: Fit,
    /// The picture's own if not given.
    pub format: Option<Format>,
}

/// How a picture meets a width and a height that have other proportions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Fit {
    /// As large as fits into both.
    #[default]
    Contain,
    /// As small as fills both; what is over is cut off on both sides alike.
    Cover,
    /// Exactly both, in other proportions.
    Fill,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Png,
    Jpeg,
    WebP,
}

impl Parameters {
    pub fn parse(query: &str) -> Result<Self, Refusal> {
        let (mut width, mut height, mut fit, mut format) = (None, None, None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let is_first = match name {
                "width" => width.replace(side(name, value)?).is_none(),
                "height" => height.replace(side(name, value)?).is_none(),
                "fit" => fit.replace(Fit::parse(value)?).is_none(),
                "format" => format.replace(Format::parse(value)?).is_none(),
                _ => {
                    return refuse(format!(
                        "There is no parameter `{}`; there are width, height, fit and format.",
                        name.escape_default()
                    ));
                }
            };
            if !is_first {
                return refuse(format!("The parameter `{name}` is given twice."));
            }
        }
        if width.is_none() && height.is_none() && format.is_none() {
            return refuse("Say what to make of the picture: width, height or format.".to_owned());
        }
        if fit.is_some() && (width.is_none() || height.is_none()) {
            return refuse("The parameter `fit` needs both width and height.".to_owned());
        }
        Ok(Self { width, height, fit: fit.unwrap_or_default(), format })
    }
}

fn side(name: &str, value: &str) -> Result<u32, Refusal> {
    // Digits only: `parse` would take a sign.
    let digits = value.bytes().all(|byte| byte.is_ascii_digit());
    match value.parse() {
        Ok(side @ 1..=MAX_OUTPUT_SIDE) if digits => Ok(side),
        _ => refuse(format!(
            "The parameter `{name}` is a number of pixels from 1 to {MAX_OUTPUT_SIDE}, not `{}`.",
            value.escape_default()
        )),
    }
}

impl Fit {
    fn parse(value: &str) -> Result<Self, Refusal> {
        match value {
            "contain" => Ok(Self::Contain),
            "cover" => Ok(Self::Cover),
            "fill" => Ok(Self::Fill),
            _ => refuse(format!(
                "The parameter `fit` is contain, cover or fill, not `{}`.",
                value.escape_default()
            )),
        }
    }
}

impl Format {
    fn parse(value: &str) -> Result<Self, Refusal> {
        match value {
            "png" => Ok(Self::Png),
            "jpeg" | "jpg" => Ok(Self::Jpeg),
            "webp" => Ok(Self::WebP),
            _ => refuse(format!(
                "The parameter `format` is png, jpeg or webp, not `{}`.",
                value.escape_default()
            )),
        }
    }

    /// The format that a picture's first bytes show.
    pub fn of(picture: &[u8]) -> Option<Self> {
        match image::guess_format(picture).ok()? {
            ImageFormat::Png => Some(Self::Png),
            ImageFormat::Jpeg => Some(Self::Jpeg),
            ImageFormat::WebP => Some(Self::WebP),
            _ => None,
        }
    }

    pub fn image_format(self) -> ImageFormat {
        match self {
            Self::Png => ImageFormat::Png,
            Self::Jpeg => ImageFormat::Jpeg,
            Self::WebP => ImageFormat::WebP,
        }
    }

    pub fn media_type(self) -> &'static str {
        self.image_format().to_mime_type()
    }
}

fn refuse<T>(sentence: String) -> Result<T, Refusal> {
    Err(Refusal::Parameters(sentence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_parameter_has_its_values() {
        let parse = |query: &str| Parameters::parse(query).unwrap();
        let both = Parameters { width: Some(3), height: Some(8192), ..Default::default() };
        assert_eq!(parse("width=3&height=8192"), both);
        assert_eq!(parse("&height=8192&&width=3&"), both);
        assert_eq!(parse("width=3&height=8192&fit=contain"), both);
        assert_eq!(parse("width=3&height=8192&fit=cover").fit, Fit::Cover);
        assert_eq!(parse("width=3&height=8192&fit=fill").fit, Fit::Fill);
        for (name, format) in
            [("png", Format::Png), ("jpeg", Format::Jpeg), ("jpg", Format::Jpeg), ("webp", Format::WebP)]
        {
            assert_eq!(
                parse(&format!("format={name}")),
                Parameters { format: Some(format), ..Default::default() }
            );
        }
    }

    #[test]
    fn everything_else_is_refused_with_a_sentence() {
        for query in [
            "",
            "&",
            "width",
            "width=",
            "width=0",
            "width=+1",
            "width=-1",
            "width=1.5",
            "width=%31",
            "width=8193",
            "width=99999999999999999999",
            "height=x",
            "width=1&width=1",
            "width=1&fit=cover",
            "fit=cover",
            "width=1&height=1&fit=crop",
            "format=gif",
            "width=1&Height=1",
            "width=1&\"<x>=2",
        ] {
            let refusal = Parameters::parse(query).unwrap_err();
            let sentence = refusal.to_string();
            assert_eq!(refusal.status(), 400, "{query}");
            assert!(sentence.ends_with('.') && sentence.is_ascii(), "{query}: {sentence}");
        }
    }
}
