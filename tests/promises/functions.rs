//! What the three functions do for a client that nobody here wrote.
use std::process::Command;

use anyhow::{Context, Result, ensure};
use image::{DynamicImage, GenericImageView, ImageFormat, Rgb, RgbImage};
use tests::{Stack, Verdicts, programs, stack::Plan};

/// A picture whose left half is red and whose right half is blue.
fn picture(width: u32, height: u32) -> DynamicImage {
    RgbImage::from_fn(width, height, |x, _| if x < width / 2 { Rgb([255, 0, 0]) } else { Rgb([0, 0, 255]) })
        .into()
}

#[test]
fn a_picture_is_resized() -> Result<()> {
    let stack = Plan::new(Verdicts::Auto).function("resize", "resize").without_readiness("resize").start();
    let curl = programs::client("curl", "curl");
    for (format, suffix) in
        [(ImageFormat::Png, "png"), (ImageFormat::Jpeg, "jpg"), (ImageFormat::WebP, "webp")]
    {
        let sent = stack.folder().join(format!("sent.{suffix}"));
        picture(640, 400).save_with_format(&sent, format)?;
        let received = stack.folder().join("received.png");
        let url = format!("http://{}/function/resize?width=64&height=40&fit=fill&format=png", stack.http);
        let output = Command::new(&curl)
            .args(["-sS", "--fail-with-body", "--max-time", "60", "--data-binary"])
            .arg(format!("@{}", sent.display()))
            .args(["-H", &format!("Content-Type: {}", format.to_mime_type()), "-o"])
            .arg(&received)
            .arg(url)
            .output()?;
        let answer = std::fs::read(&received).unwrap_or_default();
        ensure!(
            output.status.success(),
            "{suffix}: {} {}",
            String::from_utf8_lossy(&output.stderr),
            answer.escape_ascii()
        );
        let small = image::load_from_memory_with_format(&answer, ImageFormat::Png).context(suffix)?;
        ensure!(small.dimensions() == (64, 40), "{suffix}: {:?}", small.dimensions());
        let (left, right) = (small.get_pixel(8, 20).0, small.get_pixel(56, 20).0);
        ensure!(
            left[0] > 200 && left[2] < 60 && right[2] > 200 && right[0] < 60,
            "{suffix}: {left:?} {right:?}"
        );
    }
    // Not a picture: the client's fault, in a sentence.
    let answer =
        stack.client()?.request("POST", "/function/resize?width=10&height=10", "x", Some(b"no picture"))?;
    ensure!(
        (400..500).contains(&answer.status()) && answer.text().contains(' '),
        "{} {}",
        answer.status(),
        answer.text()
    );
    Ok(())
}

#[test]
fn hello_greets() -> Result<()> {
    let stack = Stack::start(Verdicts::Auto);
    let mut client = stack.client()?;
    let plain = client.request("GET", "/function/hello?name=J%C3%B6rg", "x", None)?;
    ensure!(plain.text().starts_with("Hello, Jörg!"), "{plain:?}");
    client.send(b"GET /function/hello?name=you HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\n\r\n")?;
    let json = client.response()?;
    ensure!(
        json.head.field("content-type").is_some_and(|kind| kind.starts_with("application/json")),
        "{json:?}"
    );
    ensure!(json.json().to_string().contains("Hello, you!"), "{json:?}");
    Ok(())
}

#[test]
fn echo_tells_what_it_was_asked() -> Result<()> {
    let stack = Stack::start(Verdicts::Auto);
    for mut client in [stack.client()?, stack.tls_client("echo")?] {
        client.send(
            b"DELETE /function/echo/a/b?c=d HTTP/1.1\r\nHost: echo.faas.local\r\nX-Test: some value\r\n\r\n",
        )?;
        let json = client.response()?.json();
        ensure!(json["method"] == "DELETE", "{json}");
        ensure!(json["path"].as_str().is_some_and(|path| path.starts_with("/a/b")), "{json}");
        ensure!(json["headers"]["x-test"] == "some value", "{json}");
    }
    Ok(())
}

/// A function that is taken over can't signal or trace another one.
#[test]
fn each_function_is_a_user_of_its_own() -> Result<()> {
    let mut stack = Stack::start(Verdicts::Auto);
    let processes = stack.function_processes();
    let user = |pid: &i32| -> Result<String> {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
        let users =
            status.lines().find_map(|line| line.strip_prefix("Uid:")).context("a process has users")?;
        Ok(users.trim().to_owned())
    };
    let mut users = processes.iter().map(user).collect::<Result<Vec<_>>>()?;
    ensure!(users.len() == 3, "echo, hello and refusal are {users:?}");
    users.sort();
    users.dedup();
    ensure!(users.len() == 3 && users.iter().all(|user| !user.starts_with("0\t")), "{users:?}");
    Ok(())
}
