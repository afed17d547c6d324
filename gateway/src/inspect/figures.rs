//! Numbers and times in few characters.
use crate::admin::report::Quantile;

/// A count in at most five characters, as long as it is below 10^15.
pub fn count(value: f64) -> String {
    const UNITS: [&str; 5] = ["", "k", "M", "G", "T"];
    let mut value = value;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 if value.fract() == 0.0 || value >= 99.5 => format!("{value:.0}"),
        0 => format!("{value:.1}"),
        _ if value < 99.5 => format!("{value:.1}{}", UNITS[unit]),
        _ => format!("{value:.0}{}", UNITS[unit]),
    }
}

/// What a share of the observations stays below.
pub fn quantile(quantile: Option<Quantile>) -> String {
    match quantile {
        None => "-".to_owned(),
        Some(Quantile::AtMost(seconds)) => format!("≤{}", seconds_of(seconds)),
        Some(Quantile::Above(seconds)) => format!(">{}", seconds_of(seconds)),
    }
}

fn seconds_of(seconds: f64) -> String {
    let micros = (seconds * 1e6).round() as u64;
    match micros {
        0..1000 => format!("{micros}µs"),
        1000..1_000_000 => format!("{}ms", micros as f64 / 1e3),
        _ => format!("{}s", micros as f64 / 1e6),
    }
}

pub fn span(seconds: f64) -> String {
    let seconds = seconds as u64;
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match () {
        () if days > 0 => format!("{days} d {} h", hours % 24),
        () if hours > 0 => format!("{hours} h {} min", minutes % 60),
        () if minutes > 0 => format!("{minutes} min {} s", seconds % 60),
        () => format!("{seconds} s"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_short() {
        for (value, text) in [
            (0.0, "0"),
            (7.0, "7"),
            (7.25, "7.2"),
            (999.0, "999"),
            (999.7, "1.0k"),
            (1234.0, "1.2k"),
            (123_456.0, "123k"),
            (5e6, "5.0M"),
            (5e14, "500T"),
        ] {
            assert_eq!(count(value), text);
        }
        for (value, text) in [
            (None, "-"),
            (Some(Quantile::AtMost(0.000_25)), "≤250µs"),
            (Some(Quantile::AtMost(0.0025)), "≤2.5ms"),
            (Some(Quantile::AtMost(0.5)), "≤500ms"),
            (Some(Quantile::Above(10.0)), ">10s"),
        ] {
            assert_eq!(quantile(value), text);
        }
        assert_eq!(span(59.9), "59 s");
        assert_eq!(span(3_700.0), "1 h 1 min");
        assert_eq!(span(200_000.0), "2 d 7 h");
    }
}
