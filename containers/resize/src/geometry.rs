//! Which part of a picture becomes a result of which size.
use crate::{
    parameters::{Fit, Parameters},
    refusal::Refusal,
};

/// A side of what is made; screens and printers need less.
pub const MAX_OUTPUT_SIDE: u32 = 8192;
/// Pixels of what is made: with `MAX_OUTPUT_SIDE` alone one request could ask for 64 Mi of them.
pub const MAX_OUTPUT_PIXELS: u64 = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    pub width: u32,
    pub height: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Plan {
    /// The part of the source at its middle that is used, in source pixels.
    pub used: (f64, f64),
    pub result: Size,
}

impl Size {
    /// With its sides exchanged.
    pub fn turned(self) -> Self {
        Self { width: self.height, height: self.width }
    }
}

impl Plan {
    pub fn new(source: Size, parameters: &Parameters) -> Result<Self, Refusal> {
        let whole = (f64::from(source.width), f64::from(source.height));
        let (used, (width, height)) = match (parameters.width, parameters.height) {
            (None, None) => (whole, (source.width.into(), source.height.into())),
            (Some(width), None) => (whole, (width.into(), scaled(source.height, width, source.width))),
            (None, Some(height)) => (whole, (scaled(source.width, height, source.height), height.into())),
            (Some(width), Some(height)) => match parameters.fit {
                Fit::Fill => (whole, (width.into(), height.into())),
                Fit::Cover => (covered(source, Size { width, height }), (width.into(), height.into())),
                Fit::Contain => (whole, contained(source, Size { width, height })),
            },
        };
        let side = u64::from(MAX_OUTPUT_SIDE);
        if width > side || height > side || width * height > MAX_OUTPUT_PIXELS {
            return Err(Refusal::ResultTooLarge { width, height });
        }
        Ok(Self { used, result: Size { width: width as u32, height: height as u32 } })
    }
}

/// `side * to / from`, rounded, and at least a pixel.
fn scaled(side: u32, to: u32, from: u32) -> u64 {
    let from = u64::from(from);
    ((u64::from(side) * u64::from(to) + from / 2) / from).max(1)
}

/// The size with the source's proportions that touches the box from within.
fn contained(source: Size, within: Size) -> (u64, u64) {
    if is_wider(source, within) {
        (within.width.into(), scaled(source.height, within.width, source.width).min(within.height.into()))
    } else {
        (scaled(source.width, within.height, source.height).min(within.width.into()), within.height.into())
    }
}

/// The part of the source that has the box's proportions, as large as can be.
fn covered(source: Size, over: Size) -> (f64, f64) {
    let (width, height) = (f64::from(source.width), f64::from(source.height));
    let proportion = f64::from(over.width) / f64::from(over.height);
    if is_wider(source, over) {
        ((height * proportion).clamp(1.0, width), height)
    } else {
        (width, (width / proportion).clamp(1.0, height))
    }
}

fn is_wider(a: Size, b: Size) -> bool {
    u64::from(a.width) * u64::from(b.height) > u64::from(b.width) * u64::from(a.height)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn plan(source: (u32, u32), width: Option<u32>, height: Option<u32>, fit: Fit) -> Plan {
        let parameters = Parameters { width, height, fit, format: None };
        Plan::new(Size { width: source.0, height: source.1 }, &parameters).unwrap()
    }

    fn result(source: (u32, u32), width: Option<u32>, height: Option<u32>, fit: Fit) -> (u32, u32) {
        let Size { width, height } = plan(source, width, height, fit).result;
        (width, height)
    }

    #[test]
    fn one_side_keeps_the_proportions_and_none_the_size() {
        assert_eq!(result((400, 300), Some(200), None, Fit::Contain), (200, 150));
        assert_eq!(result((400, 300), None, Some(600), Fit::Contain), (800, 600));
        assert_eq!(result((400, 300), None, None, Fit::Contain), (400, 300));
        assert_eq!(result((10_000, 1), Some(10), None, Fit::Contain), (10, 1));
        assert_eq!(result((3, 2), Some(2), None, Fit::Contain), (2, 1));
    }

    #[test]
    fn two_sides_are_met_as_the_fit_says() {
        let both = |source, fit| plan(source, Some(100), Some(100), fit);
        let square = Size { width: 100, height: 100 };
        assert_eq!(both((400, 200), Fit::Contain).result, Size { width: 100, height: 50 });
        assert_eq!(both((200, 400), Fit::Contain).result, Size { width: 50, height: 100 });
        assert_eq!(both((10, 5), Fit::Contain).result, Size { width: 100, height: 50 });
        assert_eq!(both((400, 200), Fit::Fill), Plan { used: (400.0, 200.0), result: square });
        assert_eq!(both((400, 200), Fit::Cover), Plan { used: (200.0, 200.0), result: square });
        assert_eq!(both((200, 400), Fit::Cover), Plan { used: (200.0, 200.0), result: square });
        assert_eq!(both((100, 1), Fit::Cover).used, (1.0, 1.0));
    }

    #[test]
    fn a_result_has_a_largest_size() {
        let refused = |source: (u32, u32), parameters| {
            let source = Size { width: source.0, height: source.1 };
            matches!(Plan::new(source, &parameters), Err(Refusal::ResultTooLarge { .. }))
        };
        let width = |width| Parameters { width: Some(width), ..Default::default() };
        assert!(refused((1, 100), width(100)));
        assert!(refused((1, 1), width(4097)));
        assert!(!refused((1, 1), width(4096)));
        assert!(refused((5000, 5000), Parameters::default()));
        assert!(refused((u32::MAX, u32::MAX), width(8192)));
        assert!(refused((1, u32::MAX), width(8192)));
    }

    fn sizes() -> impl Strategy<Value = (u32, u32)> {
        (1u32..=3000, 1u32..=3000)
    }

    proptest! {
        #[test]
        fn contain_touches_the_box_from_within(source in sizes(), within in sizes()) {
            let (width, height) = result(source, Some(within.0), Some(within.1), Fit::Contain);
            prop_assert!((1..=within.0).contains(&width) && (1..=within.1).contains(&height));
            prop_assert!(width == within.0 || height == within.1);
            // Either side is at most half a pixel from the exact proportions, seen from the other, or is one pixel.
            let (exact_width, exact_height) = (
                f64::from(height) * f64::from(source.0) / f64::from(source.1),
                f64::from(width) * f64::from(source.1) / f64::from(source.0),
            );
            let near = |side: u32, exact: f64| side == 1 || (f64::from(side) - exact).abs() <= 0.5;
            prop_assert!(near(width, exact_width) || near(height, exact_height));
        }

        #[test]
        fn cover_uses_a_part_with_the_boxs_proportions(source in sizes(), over in sizes()) {
            let Plan { used, result } = plan(source, Some(over.0), Some(over.1), Fit::Cover);
            prop_assert_eq!((result.width, result.height), over);
            prop_assert!((1.0..=f64::from(source.0)).contains(&used.0) && (1.0..=f64::from(source.1)).contains(&used.1));
            prop_assert!(used.0 == f64::from(source.0) || used.1 == f64::from(source.1));
            if used.0 > 1.0 && used.1 > 1.0 {
                let (is, wanted) = (used.0 / used.1, f64::from(over.0) / f64::from(over.1));
                prop_assert!((is / wanted - 1.0).abs() < 1e-9);
            }
        }
    }
}
