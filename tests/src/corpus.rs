//! First flights of every kind, good and bad, that a seed repeats.
use crate::{
    hello::{self, EXTENSION_PADDING, EXTENSION_SERVER_NAME, GREASE, Hello, server_name, server_names},
    pattern::Random,
    probe::{Manner, Port},
};

#[derive(Clone, Debug)]
pub struct Input {
    pub port: Port,
    pub bytes: Vec<u8>,
    pub manner: Manner,
    /// The function that must answer; `None` where it is not known by construction.
    pub function: Option<String>,
}

impl Input {
    pub fn show(&self) -> String {
        let shown = self.bytes.escape_ascii().to_string();
        let shown = if shown.len() > 1500 {
            format!("{}… ({} bytes)", &shown[..1500], self.bytes.len())
        } else {
            shown
        };
        format!(
            "{:?} cut at {:?}, half-closed: {}: {shown}",
            self.port, self.manner.cuts, self.manner.half_close
        )
    }
}

const FUNCTIONS: [&str; 2] = ["echo", "hello"];

/// A request or a hello, half of them broken in some way.
pub fn input(random: &mut Random) -> Input {
    let port = *random.choose(&[Port::Http, Port::Https]);
    let (mut bytes, mut function) = match port {
        Port::Http => request(random),
        Port::Https => flight(random),
    };
    if random.below(2) == 0 {
        function = None;
        damage(random, &mut bytes);
    }
    let count = *random.choose(&[0, 0, 1, 2, 8]);
    let cuts = random.cuts(bytes.len(), count);
    // Without its end, an incomplete flight would wait for the deadline.
    Input { port, bytes, manner: Manner { cuts, half_close: true }, function }
}

fn damage(random: &mut Random, bytes: &mut Vec<u8>) {
    const TELLING: &[u8] = b"\0\r\n /:?#%*\t\x7f\x80\xff\x16\x03\x01GP";
    for _ in 0..random.within(1, 3) {
        if bytes.is_empty() {
            return;
        }
        // What routes stands at the beginning.
        let range = if random.below(3) == 0 { bytes.len() } else { bytes.len().min(90) };
        let at = random.below(range);
        match random.below(7) {
            0 => bytes.truncate(at),
            1 => drop(bytes.remove(at)),
            2 => bytes.insert(at, *random.choose(TELLING)),
            3 => bytes[at] = *random.choose(TELLING),
            4 => bytes[at] ^= 1 << random.below(8),
            5 => bytes[at] = random.number() as u8,
            _ => {
                let length = random.within(1, 20);
                let copy: Vec<u8> = bytes.iter().copied().skip(at).take(length).collect();
                bytes.splice(at..at, copy);
            }
        }
    }
}

fn request(random: &mut Random) -> (Vec<u8>, Option<String>) {
    const METHODS: [&str; 8] =
        ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PRI", "x-1~", "UPDATEREDIRECTREF"];
    const BEFORE: [&str; 6] = ["", "", "", "http://h", "HTTPS://h:1", "http://[::1]:80"];
    const MISSES: [&str; 14] = [
        "/",
        "*",
        "/function",
        "/function/",
        "/function//echo",
        "/function/Echo",
        "/function/%65cho",
        "/function/echoevil",
        "/function/nobody",
        "/functional/echo",
        "//function/echo",
        "/x/function/echo",
        "echo",
        "h",
    ];
    const AFTER: [&str; 7] = ["", "/", "?x=1", "#x", "/../hello", "/%2e", "?/function/hello"];
    const FIELDS: [&str; 6] = [
        "A: b",
        "Accept: */*",
        "User-Agent: corpus",
        "Empty:",
        "X-Long: 0123456789012345678901234567890123456789012345678901234567890123456789",
        "Cookie: a=b; c=d",
    ];
    let leading = "\r\n".repeat(*random.choose(&[0, 0, 0, 1, 2]));
    let function = *random.choose(&FUNCTIONS);
    let hit = random.below(4) > 0;
    let after = random.choose(&AFTER);
    let target = if hit {
        format!("{}/function/{function}{after}", random.choose(&BEFORE))
    } else {
        (*random.choose(&MISSES)).to_owned()
    };
    let method = random.choose(&METHODS);
    let mut head = format!("{leading}{method} {target} HTTP/1.1\r\nHost: x.example\r\n");
    for _ in 0..random.below(5) {
        let field: &&str = random.choose(&FIELDS);
        head.push_str(field);
        head.push_str("\r\n");
    }
    head.push_str("\r\n");
    (head.into_bytes(), hit.then(|| function.to_owned()))
}

fn flight(random: &mut Random) -> (Vec<u8>, Option<String>) {
    const DOMAINS: [&str; 3] = ["faas.local", "localhost", "FAAS.Local"];
    const MISSES: [&[u8]; 10] = [
        b"",
        b"nobody.faas.local",
        b"echo",
        b"echo.faas.local.",
        b"echo.faas.localhost",
        b"xecho.faas.local",
        b"127.0.0.1",
        b"echo\0.faas.local",
        b"\xc3\xa9cho.faas.local",
        b"a.echo.faas.local",
    ];
    let function = *random.choose(&FUNCTIONS);
    let (name, hit) = match random.below(6) {
        0 => (random.choose(&MISSES).to_vec(), false),
        1 => (random.bytes(random.clone().within(1, 300)), false),
        _ => (format!("{function}.{}", random.choose(&DOMAINS)).into_bytes(), true),
    };
    let sni = match random.below(12) {
        0 => server_names(&[(0, &name), (0, b"other.example")]),
        1 => server_names(&[(1, &name)]),
        _ => server_name(&name),
    };
    let mut known = (sni == server_name(&name) && hit).then(|| function.to_owned());
    let mut hello = Hello::new();
    if random.below(3) == 0 {
        hello = hello.post_quantum();
    }
    if random.below(3) == 0 {
        hello = hello.led_by(GREASE, [0]);
    }
    if random.below(4) == 0 {
        hello = hello.with(EXTENSION_PADDING, vec![0; random.below(15_000)]);
    }
    let at = random.below(hello.extensions.len() + 1);
    hello.extensions.insert(at, (EXTENSION_SERVER_NAME, sni.clone()));
    match random.below(15) {
        0 => {
            hello = hello.with(EXTENSION_SERVER_NAME, sni);
            known = None;
        }
        1 => hello.session_id.clear(),
        _ => {}
    }
    let message = hello.message();
    let size = *random.choose(&[hello::MAX_FRAGMENT_BYTES, hello::MAX_FRAGMENT_BYTES, 1000, 100, 7, 1]);
    (hello::records(&message, size), known)
}
