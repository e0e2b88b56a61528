//! The date, for templates that tell the model what day it is.

use std::fmt::Write;

use chrono::{DateTime, Local, TimeZone};
use minijinja::{Error, ErrorKind};

/// `strftime_now(format)`: the local time, formatted as Python's `strftime` does.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    formatted(Local::now(), format)
}

fn formatted<Zone: TimeZone>(time: DateTime<Zone>, format: &str) -> Result<String, Error>
where
    Zone::Offset: std::fmt::Display,
{
    let mut text = String::new();
    // A bad format fails when it is written; `to_string` would panic then.
    write!(text, "{}", time.format(format)).map_err(|_| {
        let message = format!("strftime_now: {format:?} is no format of a date");
        Error::new(ErrorKind::InvalidOperation, message)
    })?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use chrono::Utc;

    use super::*;

    #[test]
    fn is_a_date_formatted_as_in_python() {
        let time = Utc.with_ymd_and_hms(2026, 3, 7, 9, 5, 0).unwrap();
        assert_eq!(formatted(time, "%d %b %Y").unwrap(), "07 Mar 2026");
        assert_eq!(
            formatted(time, "%A, %B %-d; %H:%M 100%%").unwrap(),
            "Saturday, March 7; 09:05 100%"
        );
    }

    #[test]
    fn is_a_bad_format_an_error() {
        let time = Utc.with_ymd_and_hms(2026, 3, 7, 9, 5, 0).unwrap();
        assert!(formatted(time, "%!").is_err());
    }
}
