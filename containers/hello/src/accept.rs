//! Which of two forms an Accept field prefers (RFC 9110 §12.5.1).

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Text,
    Json,
}

/// `None` when the client takes neither. Text wins a tie, because it is what a person can read.
pub fn prefer<'a>(fields: impl Iterator<Item = &'a [u8]>) -> Option<Form> {
    let ranges: Vec<Range<'_>> =
        fields.flat_map(|field| field.split(|&byte| byte == b',')).filter_map(Range::parse).collect();
    let text = quality(&ranges, b"text", b"plain");
    let json = quality(&ranges, b"application", b"json");
    match text.max(json) {
        0 => None,
        _ if json > text => Some(Form::Json),
        _ => Some(Form::Text),
    }
}

/// The weight that the most specific range gives to a media type, in thousandths.
fn quality(ranges: &[Range<'_>], kind: &[u8], subtype: &[u8]) -> u16 {
    if ranges.is_empty() {
        return 1000;
    }
    let matching = ranges.iter().filter_map(|range| Some((range.specificity(kind, subtype)?, range.weight)));
    matching.max().map_or(0, |(_, weight)| weight)
}

struct Range<'a> {
    kind: &'a [u8],
    subtype: &'a [u8],
    weight: u16,
}

impl<'a> Range<'a> {
    /// A range that makes no sense asks for nothing.
    fn parse(text: &'a [u8]) -> Option<Self> {
        let mut parts = text.split(|&byte| byte == b';').map(<[u8]>::trim_ascii);
        let media = parts.next()?;
        let slash = media.iter().position(|&byte| byte == b'/')?;
        let weight = parts.find_map(|parameter| match parameter {
            [b'q' | b'Q', b'=', weight @ ..] => Some(thousandths(weight)),
            _ => None,
        });
        Some(Self {
            kind: &media[..slash],
            subtype: &media[slash + 1..],
            weight: weight.unwrap_or(Some(1000))?,
        })
    }

    fn specificity(&self, kind: &[u8], subtype: &[u8]) -> Option<u8> {
        let matches = |wanted: &[u8], have: &[u8]| wanted.eq_ignore_ascii_case(have);
        match (self.kind, self.subtype) {
            (b"*", b"*") => Some(0),
            (range, b"*") if matches(range, kind) => Some(1),
            (range, exact) if matches(range, kind) && matches(exact, subtype) => Some(2),
            _ => None,
        }
    }
}

/// `0`, `0.5`, `1.000`: at most three digits behind the point, at most one in all.
fn thousandths(weight: &[u8]) -> Option<u16> {
    let (whole, fraction) = match weight {
        [whole] => (whole, &[][..]),
        [whole, b'.', fraction @ ..] if fraction.len() <= 3 => (whole, fraction),
        _ => return None,
    };
    let digits = [*whole].into_iter().chain(fraction.iter().copied()).chain([b'0'; 3]).take(4);
    let value = digits.map(|byte| byte.is_ascii_digit().then(|| u16::from(byte - b'0')));
    value.into_iter().try_fold(0, |sum, digit| Some(sum * 10 + digit?)).filter(|&value| value <= 1000)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn prefer(fields: &[&str]) -> Option<Form> {
        super::prefer(fields.iter().map(|field| field.as_bytes()))
    }

    #[test]
    fn weights_decide_and_text_wins_a_tie() {
        for fields in [
            &[][..],
            &["*/*"],
            &["text/html,application/xhtml+xml,*/*;q=0.8"],
            &["text/*, application/json"],
            &["application/json;q=0.5, text/plain;q=0.8"],
            &["application/json;q=0, */*"],
            &["nonsense, */*"],
        ] {
            assert_eq!(prefer(fields), Some(Form::Text), "{fields:?}");
        }
        for fields in [
            &["application/json"][..],
            &["Application/JSON; charset=utf-8"],
            &["text/plain;q=0.1", "application/*"],
            &["*/*;q=0.1, application/json;q=0.2"],
            &["text/plain;q=0, */*"],
        ] {
            assert_eq!(prefer(fields), Some(Form::Json), "{fields:?}");
        }
        for fields in [&["image/png"][..], &["*/*;q=0"], &["text/plain;q=0.0, application/json;q=0.000"]] {
            assert_eq!(prefer(fields), None, "{fields:?}");
        }
    }

    #[test]
    fn weights_have_three_digits() {
        assert_eq!(thousandths(b"1"), Some(1000));
        assert_eq!(thousandths(b"0."), Some(0));
        assert_eq!(thousandths(b"0.25"), Some(250));
        assert_eq!(thousandths(b"0.001"), Some(1));
        for wrong in [&b""[..], b"2", b"1.001", b"0.0001", b"-1", b".5", b"0,5", b"0.x"] {
            assert_eq!(thousandths(wrong), None, "{}", wrong.escape_ascii());
        }
    }
}
