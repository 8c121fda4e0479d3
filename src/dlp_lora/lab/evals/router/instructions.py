"""Instructions that people write around a question, in eight languages, none of which a router was trained with."""

import random
from collections.abc import Mapping, Sequence

from dlp_lora.lab.evals.router.samples import Question, Sample
from dlp_lora.router import Context

BEFORE: Mapping[str, tuple[str, ...]] = {
    "English": (
        "I would like your opinion on this one. Take all the time that you need.",
        "Pretend that you are a patient teacher. A pupil brings you the exercise below.",
        "Here comes the next item of my list. Treat it like the ones before.",
        "Our team collects answers from several systems. Yours will be compared with them, so be accurate.",
    ),
    "German": (
        "Ich brauche heute deine Unterstützung. Es geht um Folgendes.",
        "Stell dir vor, du wärst ein geduldiger Lehrer. Ein Schüler bringt dir diese Übung.",
        "Hier kommt der nächste Punkt meiner Liste. Behandle ihn so wie die anderen.",
        "Sie arbeiten für eine Behörde. Prüfen Sie den nachstehenden Eintrag gewissenhaft.",
    ),
    "Spanish": (
        "Hoy necesito que me eches una mano. Se trata de lo siguiente.",
        "Imagina que eres un profesor paciente. Un alumno te trae este ejercicio.",
        "Aquí va el siguiente punto de mi lista. Trátalo igual que los anteriores.",
        "Trabajas para una oficina pública. Revisa la siguiente entrada con cuidado.",
    ),
    "Italian": (
        "Oggi mi serve una mano. Si tratta di questo.",
        "Immagina di essere un insegnante paziente. Un alunno ti porta questo esercizio.",
        "Ecco il prossimo punto della mia lista. Trattalo come gli altri.",
        "Lavori per un ufficio pubblico. Controlla con attenzione la voce qui sotto.",
    ),
    "French": (
        "J'ai besoin d'un coup de main aujourd'hui. Voici de quoi il s'agit.",
        "Imagine que tu es un professeur patient. Un élève t'apporte cet exercice.",
        "Voici le prochain point de ma liste. Traite-le comme les précédents.",
        "Vous travaillez pour une administration. Examinez soigneusement l'entrée ci-dessous.",
    ),
    "Portuguese": (
        "Hoje preciso de uma ajuda. É sobre o seguinte.",
        "Imagine que você é um professor paciente. Um aluno traz este exercício.",
        "Aqui está o próximo item da minha lista. Trate-o como os anteriores.",
        "Você trabalha em uma repartição pública. Verifique com cuidado o registro abaixo.",
    ),
    "Chinese": (
        "今天我想请你帮个忙。事情是这样的。",
        "假设你是一位耐心的老师。有个学生给你带来了这道练习。",
        "这是我清单上的下一项。请像处理前面的一样处理它。",
        "你在一家机关工作。请认真核对下面的内容。",
    ),
    "Russian": (
        "Сегодня мне нужна твоя помощь. Речь вот о чём.",
        "Представь, что ты терпеливый учитель. Ученик принёс тебе это упражнение.",
        "Вот следующий пункт моего списка. Поступи с ним так же, как с предыдущими.",
        "Вы работаете в учреждении. Внимательно проверьте запись ниже.",
    ),
}
AFTER: Mapping[str, tuple[str, ...]] = {
    "English": (
        "That is all. I look forward to your reply.",
        "Please go over it twice. Then tell me your result and leave out the rest.",
        "No introduction and no summary.",
        "Check yourself before you send it. A wrong answer costs us money.",
    ),
    "German": (
        "Das war alles. Ich freue mich auf deine Rückmeldung.",
        "Geh es bitte zweimal durch. Nenne mir danach dein Ergebnis und lass den Rest weg.",
        "Ohne Einleitung und ohne Zusammenfassung.",
        "Kontrolliere dich, bevor du es abschickst. Ein Fehler kostet uns Geld.",
    ),
    "Spanish": (
        "Eso es todo. Quedo a la espera de tu respuesta.",
        "Repásalo dos veces, por favor. Después dime tu resultado y omite lo demás.",
        "Sin introducción y sin resumen.",
        "Compruébalo antes de enviarlo. Un error nos cuesta dinero.",
    ),
    "Italian": (
        "È tutto. Aspetto una tua risposta.",
        "Ripassalo due volte, per piacere. Poi dimmi il tuo risultato e tralascia il resto.",
        "Senza introduzione e senza riassunto.",
        "Controlla prima di inviare. Un errore ci costa denaro.",
    ),
    "French": (
        "C'est tout. J'attends ton retour.",
        "Relis-le deux fois, je te prie. Ensuite dis-moi ton résultat et laisse le reste de côté.",
        "Sans introduction et sans résumé.",
        "Vérifie avant d'envoyer. Une erreur nous coûte de l'argent.",
    ),
    "Portuguese": (
        "É só isso. Fico no aguardo da sua resposta.",
        "Leia duas vezes, por gentileza. Depois me diga o seu resultado e deixe o resto de lado.",
        "Sem introdução e sem resumo.",
        "Confira antes de enviar. Um erro nos custa dinheiro.",
    ),
    "Chinese": (
        "就是这些。期待你的回复。",
        "麻烦你看两遍。然后告诉我你的结果，其余的不用写。",
        "不要开头，也不要总结。",
        "发出之前请检查一下。出错会让我们损失钱。",
    ),
    "Russian": (
        "Это всё. Жду твоего ответа.",
        "Пройдись по нему дважды. Потом сообщи свой результат, а прочее опусти.",
        "Без вступления и без заключения.",
        "Проверь себя перед отправкой. Ошибка стоит нам денег.",
    ),
}


def among_instructions(asked: Sequence[Question], language: str, *, seed: int) -> list[Sample]:
    """The whole prompts, each among instructions of a language that are drawn for it."""
    rng = random.Random(f"instructions {language} {seed}")
    return [
        Sample(
            Context(f"{rng.choice(BEFORE[language])}\n\n{q.example.prompt}\n\n{rng.choice(AFTER[language])}"), q.task
        )
        for q in asked
    ]
