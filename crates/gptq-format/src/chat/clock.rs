//! `strftime_now`: the date that some templates put into the system prompt.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// C's `strftime` in the C locale for the directives that prompts use, in UTC.
pub(super) fn strftime(format: &str, now: SystemTime) -> Result<String, Error> {
    // A clock before 1970 counts as 1970.
    let seconds = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let days = seconds / 86400;
    let (hour, minute, second) = (seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
    let (year, month, day, day_of_year) = civil(days);
    let month_name = MONTHS[month as usize - 1];
    let day_name = DAYS[(days as usize + 4) % 7];
    let hour12 = if hour % 12 == 0 { 12 } else { hour % 12 };
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next();
        // glibc's "no padding".
        let padded = directive != Some('-');
        if !padded {
            directive = chars.next();
        }
        let two = |v: u64| {
            if padded { format!("{v:02}") } else { v.to_string() }
        };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('B') => month_name.into(),
            Some('b' | 'h') => month_name[..3].into(),
            Some('d') => two(day),
            Some('e') => format!("{day:2}"),
            Some('j') if padded => format!("{day_of_year:03}"),
            Some('j') => day_of_year.to_string(),
            Some('A') => day_name.into(),
            Some('a') => day_name[..3].into(),
            Some('H') => two(hour),
            Some('I') => two(hour12),
            Some('M') => two(minute),
            Some('S') => two(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.into(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".into(),
            Some('z') => "+0000".into(),
            Some('%') => "%".into(),
            other => {
                let directive = other.map(String::from).unwrap_or_default();
                let message = format!("strftime_now does not know `%{directive}`");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month (1 to 12), day (1 to 31) and day of the year (1 to 366) of a day counted from 1970-01-01.
fn civil(mut days: u64) -> (u64, u64, u64, u64) {
    // Whole cycles of 400 years at once, the rest year by year.
    let mut year = 1970 + 400 * (days / 146_097);
    days %= 146_097;
    let leap = |y: u64| y.is_multiple_of(4) && (!y.is_multiple_of(100) || y.is_multiple_of(400));
    while days >= 365 + u64::from(leap(year)) {
        days -= 365 + u64::from(leap(year));
        year += 1;
    }
    let day_of_year = days + 1;
    let february = 28 + u64::from(leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30] {
        if days < length {
            break;
        }
        days -= length;
        month += 1;
    }
    (year, month, days + 1, day_of_year)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    const SECONDS: Duration = Duration::from_secs(1_709_211_909);

    #[test]
    fn dates_are_those_of_the_calendar() {
        // 2024-02-29 13:05:09 UTC, a Thursday; and the edges of leap and common years.
        let day = |format| strftime(format, UNIX_EPOCH + SECONDS).unwrap();
        assert_eq!(day("%d %b %Y"), "29 Feb 2024");
        assert_eq!(
            day("%A, %B %-d, %y; %H:%M:%S = %I %p; %j %F %T%%"),
            "Thursday, February 29, 24; 13:05:09 = 01 PM; 060 2024-02-29 13:05:09%"
        );
        assert_eq!(civil(0), (1970, 1, 1, 1));
        assert_eq!(civil(364), (1970, 12, 31, 365));
        assert_eq!(civil(11_016), (2000, 2, 29, 60));
        assert_eq!(civil(11_322), (2000, 12, 31, 366));
        assert_eq!(civil(11_323), (2001, 1, 1, 1));
    }

    #[test]
    fn an_unknown_directive_is_an_error() {
        assert!(strftime("%Q", UNIX_EPOCH).is_err());
        assert!(strftime("100%", UNIX_EPOCH).is_err());
    }
}
