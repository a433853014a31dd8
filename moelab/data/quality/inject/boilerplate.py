"""The lines around the text of a page: menus, cookie notices, links to share, copyright."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from moelab.data.quality import chance
from moelab.data.quality.contract import BaseInjector, Label, Labelled
from moelab.data.quality.profiles import profile

LINES = {
    "en": (
        "Home | About | News | Contact | Login",
        "This website uses cookies to ensure you get the best experience. Accept all cookies",
        "By continuing you agree to our Terms of Use and Privacy Policy.",
        "Share on Facebook Share on Twitter Pin it Email this page",
        "Subscribe to our newsletter and never miss an update!",
        "Please enable Javascript to view the comments.",
        "You may also like",
        "Read more...",
        "Previous article Next article",
        "Posted by admin 3 comments Leave a reply",
        "Click here to download the full version",
        "Copyright © All rights reserved. Powered by WordPress",
    ),
    "fr": (
        "Accueil | À propos | Actualités | Contact | Connexion",
        "Ce site utilise des cookies pour améliorer votre expérience. Tout accepter",
        "En poursuivant, vous acceptez nos conditions d'utilisation.",
        "Partager sur Facebook Partager sur Twitter Envoyer par e-mail",
        "Abonnez-vous à notre lettre d'information !",
        "Veuillez activer Javascript pour voir les commentaires.",
        "À lire aussi",
        "Lire la suite...",
        "Article précédent Article suivant",
        "Publié par admin 3 commentaires Répondre",
        "Cliquez ici pour télécharger la version complète",
        "Copyright © Tous droits réservés. Propulsé par WordPress",
    ),
    "es": (
        "Inicio | Acerca de | Noticias | Contacto | Acceder",
        "Este sitio web utiliza cookies para mejorar su experiencia. Aceptar todas",
        "Al continuar, acepta nuestras condiciones de uso.",
        "Compartir en Facebook Compartir en Twitter Enviar por correo",
        "¡Suscríbase a nuestro boletín!",
        "Active Javascript para ver los comentarios.",
        "También le puede interesar",
        "Leer más...",
        "Artículo anterior Artículo siguiente",
        "Publicado por admin 3 comentarios Responder",
        "Haga clic aquí para descargar la versión completa",
        "Copyright © Todos los derechos reservados. Funciona con WordPress",
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Injector(BaseInjector):
    """Puts lines of a page's frame before and behind the text. Strength: their share of the characters."""

    share: float = 0.1  # of the documents
    lines: int = 6  # how many in each

    counts = ("lines",)

    def problems(self) -> Iterator[str]:
        """Yields what is wrong with `lines`."""
        most = min(map(len, LINES.values()))
        if self.lines > most:
            yield f"lines must be at most {most}, got {self.lines}"

    def apply(self, one: Labelled, fitted) -> Iterator[Labelled]:
        """Yields the document in its frame, in the language of the domain (English where none is known)."""
        document = one.document
        if chance.uniform(self.seed, self.kind, document) >= self.share:
            yield one
            return
        known = LINES.get(profile(document.domain, "en").language, LINES["en"])
        order = chance.generator(self.seed, self.kind, document).permutation(len(known))
        drawn = [known[i] for i in order[: self.lines].tolist()]
        half = (self.lines + 1) // 2
        text = "\n".join([*drawn[:half], document.text, *drawn[half:]])
        strength = 1 - len(document.text) / len(text)
        yield Labelled(document._replace(text=text), Label(self.kind, strength))
